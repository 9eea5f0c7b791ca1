"""`filao work` as its users run it: real processes, killed, signalled, and asked how they are."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import filao
import filao.sync
from filao.worker.shift import Status
from filao.worker.supervisor import Report, Slot, Supervisor

PATIENCE = 60.0
APP = """
import asyncio, ctypes, os, sys, time
import filao

claims = filao.Queue("claims", lease=30, max_attempts=3, backoff=filao.Backoff(first=0.05, jitter=0))
worker = filao.Worker("claims.db", grace=30)

@worker.consumer(claims, concurrency=4)
async def handle(message: filao.Message[dict]) -> None:
    kind = message["kind"]
    with open("log", "a") as log:
        log.write(f"{os.getpid()} {kind} {message.attempt}\\n")
    if kind == "segfault":
        await asyncio.sleep(0.05)
        ctypes.string_at(0)
    elif kind == "wait":
        while not os.path.exists("go"):
            await asyncio.sleep(0.01)
    elif kind == "block":
        time.sleep(60)
    elif kind == "thread":
        await asyncio.to_thread(time.sleep, 60)
    elif kind == "exit code":
        os._exit(3)
    elif kind == "exit in a task":
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(leave())

async def leave() -> None:
    sys.exit(3)
"""


class Work:
    """A running `filao work`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.log = folder / "out"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "filao", "work", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.log.read_text()

    def handled(self) -> list[tuple[int, str, int]]:
        """Return process, kind and attempt of every message that a handler was given."""
        log = self.folder / "log"
        rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [(int(process), kind, int(attempt)) for process, kind, attempt in rows]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self) -> int:
        return self.process.wait(PATIENCE)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def broker(folder) -> Generator[filao.sync.Broker]:
    with filao.sync.connect(folder / "claims.db") as broker:
        broker.declare(filao.Queue("claims", lease=30, max_attempts=3))
        yield broker


@contextmanager
def working(folder: Path, *arguments: str, processes: int = 1) -> Generator[Work]:
    work = Work(folder, *arguments)
    try:
        until(lambda: work.said().count("receives from") >= processes or work.process.poll() is not None)
        yield work
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            work.signal(number)
        work.ends()


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_message_that_kills_its_process_dies_after_its_attempts_and_harms_no_neighbour(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_many("claims", [{"kind": kind} for kind in ["fine"] * 10 + ["segfault"] + ["fine"] * 30])
        until(lambda: broker.stats("claims").dead)
        until(lambda: broker.stats("claims").acked == 40)
        (dead,) = broker.dead_letters("claims")
        assert (dead.body, dead.reason, dead.attempts) == ({"kind": "segfault"}, "max_attempts", 3)
        assert [failure.outcome for failure in dead.history] == ["crashed"] * 3
        assert [attempt for _, kind, attempt in work.handled() if kind == "segfault"] == [1, 2, 3]
        assert max(attempt for _, kind, attempt in work.handled() if kind == "fine") <= 2
        until(lambda: work.said().count("was ended by SIGSEGV; starting it again") == 3)


def test_a_killed_process_is_started_again_and_loses_nothing(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_many("claims", [{"kind": "wait"}] * 6)
        (victim, *_) = until(lambda: sorted({pid for pid, *_ in work.handled()}) if len(work.handled()) == 6 else None)
        os.kill(victim, signal.SIGKILL)
        until(lambda: work.said().count("receives from claims") == 3)
        (folder / "go").touch()
        until(lambda: broker.stats("claims").acked == 6)
        until(lambda: "was ended by SIGKILL; starting it again" in work.said())


@pytest.mark.parametrize("kind", ["exit code", "exit in a task"])
def test_an_exit_code_of_a_handler_ends_no_other_process(folder, broker, kind) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_to_queue("claims", {"kind": kind})
        until(lambda: broker.stats("claims").dead == 1)
        assert work.process.poll() is None
        broker.send_to_queue("claims", {"kind": "plain"})
        until(lambda: broker.stats("claims").acked == 1)
    (letter,) = broker.dead_letters("claims")
    assert letter.attempts == 3


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_thread_that_a_handler_left_does_not_keep_the_process(folder, broker, processes) -> None:
    with working(folder, "app:worker", "--processes", processes, processes=int(processes)) as work:
        broker.send_to_queue("claims", {"kind": "thread"})
        until(work.handled)
        work.signal(signal.SIGTERM)
        time.sleep(0.3)  # two signals at once would be one
        work.signal(signal.SIGTERM)
        assert work.process.wait(20) == 0  # the thread sleeps for 60
    assert broker.stats("claims").ready == 1


def test_a_process_is_replaced_when_it_has_grown(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "1", "--max-memory", "1") as work:
        broker.send_many("claims", [{"kind": "plain"}] * 64)
        until(lambda: broker.stats("claims").acked == 64)
        assert len({process for process, _, _ in work.handled()}) > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_first_signal_lets_what_runs_finish(folder, broker, processes, number) -> None:
    with working(folder, "app:worker", "--processes", processes, processes=int(processes)) as work:
        broker.send_to_queue("claims", {"kind": "wait"})
        until(work.handled)
        work.signal(number)
        broker.send_to_queue("claims", {"kind": "fine"})
        (folder / "go").touch()
        assert work.ends() == 0
    stats = broker.stats("claims")
    assert (stats.acked, stats.leased, stats.lost, stats.acked + stats.ready) == (stats.acked, 0, 0, 2)
    assert "wait" in [kind for _, kind, _ in work.handled()]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_second_signal_gives_everything_back_at_once(folder, broker, processes) -> None:
    with working(folder, "app:worker", "--processes", processes, processes=int(processes)) as work:
        broker.send_to_queue("claims", {"kind": "wait"})
        until(work.handled)
        work.signal(signal.SIGTERM)
        time.sleep(0.2)  # two signals in one moment are one: the kernel does not count them
        work.signal(signal.SIGTERM)
        assert work.ends() == 0
    stats = broker.stats("claims")
    assert (stats.ready, stats.leased, stats.lost) == (1, 0, 0)
    message = broker.receive_from_queue("claims", wait=0)
    assert message is not None
    assert message.attempt == 1


def test_a_signal_to_the_supervisor_and_to_its_processes_stops_gracefully(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_many("claims", [{"kind": "wait"}] * 6)
        pids = until(lambda: {pid for pid, *_ in work.handled()} if len(work.handled()) == 6 else None)
        for pid in (work.process.pid, *pids):  # as systemd does, to all processes of a service
            os.kill(pid, signal.SIGTERM)
        until(lambda: work.said().count("stopping") == len(pids))
        (folder / "go").touch()
        assert work.ends() == 0
    assert (broker.stats("claims").acked, broker.stats("claims").released) == (6, 0)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_hangup_stops_gracefully_and_never_at_once(folder, broker, processes) -> None:
    with working(folder, "app:worker", "--processes", processes, processes=int(processes)) as work:
        broker.send_to_queue("claims", {"kind": "wait"})
        until(work.handled)
        work.signal(signal.SIGHUP)
        until(lambda: "stopping" in work.said())
        for number in (signal.SIGHUP, signal.SIGTERM):  # as a shell that ends, and systemd, send them, too
            work.signal(number)
            time.sleep(0.2)  # see above
        (folder / "go").touch()
        assert work.ends() == 0
    stats = broker.stats("claims")
    assert (stats.acked, stats.ready, stats.lost) == (1, 0, 0)


def test_a_program_that_a_hangup_would_end_ends_by_it_once_its_worker_has_given_all_back(folder, broker) -> None:
    program = "import asyncio, app; app.worker.grace = 0; asyncio.run(app.worker.run()); print('went on')"
    ran = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE)
    broker.send_to_queue("claims", {"kind": "wait"})
    until(lambda: broker.stats("claims").leased)
    until((folder / "log").exists)
    ran.send_signal(signal.SIGHUP)
    assert (ran.communicate(timeout=PATIENCE)[0], ran.returncode) == (b"", -signal.SIGHUP)
    stats = broker.stats("claims")
    assert (stats.ready, stats.released, stats.lost) == (1, 1, 0)


WITHOUT_A_THREAD = """
import asyncio, sys, threading
from filao.worker.supervisor import Supervisor

async def main():
    before = threading.stack_size(2**62)  # more than there is
    supervisor = Supervisor([sys.executable, "-c", "import sys; sys.stdin.read()"], 1)
    running = asyncio.create_task(supervisor.run())

    async def until(condition):
        while not running.done() and not condition(supervisor.state()["processes"][0]):
            await asyncio.sleep(0.01)

    await until(lambda one: one["restarts"] or one["pid"])
    threading.stack_size(before)
    await until(lambda one: one["pid"])
    supervisor._stop()
    print(await running)

asyncio.run(main())
"""


@pytest.mark.anyio
async def test_a_supervisor_reads_the_report_of_a_worker_with_thousands_of_queues() -> None:
    slot, (reading, writing) = Slot(1), os.pipe()
    running = {f"{number:0128}": 0 for number in range(5_000)}
    told = Report(Status(ready=True, healthy=True, running=running, handled=0, problems=[]), grace=30.0)
    reports = asyncio.create_task(Supervisor([], 0)._read_reports(slot, reading))
    with os.fdopen(writing, "wb") as pipe:
        await asyncio.to_thread(pipe.write, msgspec.json.encode(told) + b"\n")
        await asyncio.to_thread(pipe.flush)
    await reports
    assert slot.report == told


def test_a_supervisor_that_gets_no_thread_to_wait_for_a_process_starts_it_again() -> None:
    """Before Python 3.12, asyncio takes a thread for each."""
    command = [sys.executable, "-c", WITHOUT_A_THREAD]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.stdout == "0\n", ran.stderr


def test_when_the_supervisor_is_killed_its_processes_end_and_give_back_what_they_hold(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_many("claims", [{"kind": "wait"}] * 6)
        pids = until(lambda: {pid for pid, *_ in work.handled()} if len(work.handled()) == 6 else None)
        work.signal(signal.SIGKILL)
        (folder / "go").touch()
        until(lambda: not any(map(is_alive, pids)))
    stats = broker.stats("claims")
    assert (stats.leased, stats.lost) == (0, 0)


def test_a_process_that_does_not_stop_is_killed_by_the_third_signal(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", processes=2) as work:
        broker.send_to_queue("claims", {"kind": "block"})
        until(work.handled)
        for _ in range(3):
            work.signal(signal.SIGTERM)
            time.sleep(0.2)  # see above
        work.ends()
    broker.send_to_queue("claims", {"kind": "fine"})
    assert broker.stats("claims").acked == 0


def test_processes_are_replaced_after_so_many_messages(folder, broker) -> None:
    broker.send_many("claims", [{"kind": "fine"}] * 50)
    with working(folder, "app:worker", "--max-messages", "20") as work:
        until(lambda: broker.stats("claims").acked == 50)
    assert len({pid for pid, *_ in work.handled()}) >= 2
    assert len(work.handled()) == 50


def test_health_checks_tell_ready_and_healthy(folder, broker) -> None:
    with working(folder, "app:worker", "--processes", "2", "--health", "0", processes=2) as work:
        address = until(lambda: work.said().partition("health checks at ")[2].partition("\n")[0])
        until(lambda: _get(address)[0] == 200)
        code, state = _get(address + "ready")
        assert (code, state["ready"], state["healthy"]) == (200, True, True)
        pid = state["processes"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: any(process["restarts"] for process in _get(address)[1]["processes"]))
        until(lambda: _get(address)[0] == 200)


def test_one_process_answers_health_checks_too_on_loopback_and_tells_no_url(folder, broker) -> None:
    with working(folder, "app:worker", "--health", "0") as work:
        address = until(lambda: work.said().partition("health checks at ")[2].partition("\n")[0])
        assert address.startswith("http://127.0.0.1:")
        code, state = _get(address)
        assert (code, state["ready"], state["running"]) == (200, True, {"claims": 0})
        assert "claims.db" not in json.dumps(state)


def test_a_port_of_the_health_check_that_is_in_use_is_told(folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        work = Work(folder, "app:worker", "--health", str(port))
        assert work.ends() == 2
    assert f"--health: 127.0.0.1:{port} cannot be listened on: Address already in use. Give" in work.said()


def test_until_idle_it_ends_when_all_is_done_and_leaves_what_is_delayed(folder, broker) -> None:
    broker.send_many("claims", [{"kind": f"claim-{number}"} for number in range(9)])
    broker.send_to_queue("claims", {"kind": "later"}, delay=3_600)
    work = Work(folder, "app:worker", "--until-idle")
    assert work.ends() == 0
    assert len(work.handled()) == 9
    assert (broker.stats("claims").ready, broker.stats("claims").delayed) == (0, 1)
    assert f"process {work.process.pid} has nothing to do: it ends" in work.said()


def test_until_idle_a_supervisor_replaces_only_processes_that_were_not(folder, broker) -> None:
    broker.send_many("claims", [{"kind": f"claim-{number}"} for number in range(3)])
    work = Work(folder, "app:worker", "--until-idle", "--processes", "2", "--max-messages", "1")
    assert work.ends() == 0
    assert sorted(kind for _, kind, _ in work.handled()) == ["claim-0", "claim-1", "claim-2"]
    assert broker.stats("claims").ready == 0
    assert work.said().count("nothing to do") == 2


@pytest.mark.parametrize("form", ["text", "json"])
def test_who_wants_to_hear_of_warnings_alone_hears_nothing_of_a_run_without_any(folder, broker, form) -> None:
    broker.send_to_queue("claims", {"kind": "claim"})
    options = ["--until-idle", "--processes", "2", "--health", "0", "--log-level", "warning", "--log", form]
    work = Work(folder, "app:worker", *options)
    assert work.ends() == 0
    assert len(work.handled()) == 1
    assert work.said() == ""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_until_idle_processes_that_could_never_receive_end_all_the_same(folder, broker, processes) -> None:
    (folder / "gone.py").write_text(
        textwrap.dedent("""
            import asyncio, os, time
            import filao
            worker = filao.Worker("claims.db")
            @worker.consumer("letters")
            async def handle(message): ...
            @worker.lifespan
            async def begin():
                await asyncio.to_thread(wait)
                yield
            def wait():
                open(f"started-{os.getpid()}", "w").close()
                while not os.path.exists("go"):
                    time.sleep(0.01)
        """)
    )
    broker.declare(filao.Queue("letters"))
    work = Work(folder, "gone:worker", "--until-idle", "--processes", processes)
    until(lambda: len(list(folder.glob("started-*"))) == int(processes))
    broker.delete_queue("letters")
    (folder / "go").touch()
    assert work.ends() == 3
    assert "queue 'letters' is not declared" in work.said()


@pytest.mark.parametrize("how", ["the command", "python -P -m filao"])
def test_a_module_named_as_one_of_pythons_own_harms_no_process_if_it_does_not_harm_the_supervisor(
    folder, broker, how
) -> None:
    (folder / "queue.py").write_text("raise ImportError('it is the queue of the application')")
    (folder / "bin").mkdir()
    (folder / "bin" / "filao").write_text("from filao.cli import main; main()")  # as an installed command begins
    begun = [str(folder / "bin" / "filao")] if how == "the command" else ["-P", "-m", "filao"]
    broker.send_to_queue("claims", {"kind": "claim"})
    program = [sys.executable, *begun, "work", "app:worker", "--processes", "2", "--until-idle"]
    ran = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ran.returncode, ran.stderr.count("nothing to do")) == (0, 2), ran.stderr


HOW_IT_RUNS = """
import sys
import filao

worker = filao.Worker("claims.db", grace=30)

@worker.consumer(filao.Queue("claims"))
async def handle(message: filao.Message[dict]) -> None:
    with open("runs", "a") as file:
        options = sys.warnoptions, sorted(sys._xoptions.items())
        print(filao.__file__, sys.flags, options, sys.stdout.write_through, file=file)
"""


def runs(folder: Path, broker: filao.sync.Broker, python: list[str]) -> list[str]:
    """Return how Python runs a worker alone, and how in two processes."""
    (folder / "how.py").write_text(HOW_IT_RUNS)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for processes in ("1", "2"):
        broker.send_to_queue("claims", {})
        program = [sys.executable, *python, "work", "how:worker", "--until-idle", "--processes", processes]
        ran = subprocess.run(program, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE, check=False)
        assert ran.returncode == 0, ran.stderr
    return (folder / "runs").read_text().splitlines()


@pytest.mark.parametrize(
    "options", ["-O -u -Werror", "-Xdev -bb -Werror", "-s -B -Xutf8 -Xno_debug_ranges -Xint_max_str_digits=700"]
)
def test_processes_run_with_the_options_of_the_python_that_starts_them(folder, broker, options) -> None:
    alone, supervised = runs(folder, broker, [*options.split(), "-P", "-m", "filao"])
    assert supervised == alone


@pytest.mark.parametrize("options", [[], ["-E"]])
def test_processes_of_a_filao_in_an_archive_run_that_one(folder, broker, tmp_path, options) -> None:
    archive, package = tmp_path / "filao.pyz", Path(filao.__file__).parent
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("__main__.py", "from filao.cli import main; main()")
        for file in package.rglob("*.*"):
            if "__pycache__" not in file.parts:
                files.write(file, file.relative_to(package.parent))
    alone, supervised = runs(folder, broker, [*options, str(archive)])
    assert alone.startswith(str(archive))
    assert supervised.startswith(str(archive))


def test_until_idle_a_signal_still_ends_it(folder, broker) -> None:
    broker.send_to_queue("claims", {"kind": "wait"})
    work = Work(folder, "app:worker", "--until-idle")
    until(work.handled)
    work.signal(signal.SIGTERM)
    until(lambda: "stopping" in work.said())
    (folder / "go").touch()
    assert work.ends() == 0
    assert "nothing to do" not in work.said()


def _get(address: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, json.load(answer)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["app"], 2, "'app' names no worker: give MODULE:WORKER"),
        (["nowhere:worker"], 2, "there is no module 'nowhere' here"),
        (
            ["./shop/app.py:worker"],
            2,
            "'./shop/app.py' is a path, and a module is named as where it is imported: shop.app",
        ),
        (["app:claims"], 2, "'claims' in 'app' is Queue("),
        (["app:nothing"], 2, "there is no 'nothing' in 'app'. The module has app:worker"),
        (["app:worker", "--health", "http"], 2, "--health 'http': give a port, or HOST:PORT"),
        (["app:worker", "--processes", "2", "--metrics", "http"], 2, "--metrics 'http': give a port, or HOST:PORT"),
        (["app:worker", "--metrics", "9" * 5_000], 2, "': give a port, or HOST:PORT"),
        (["app:worker", "--health", "é..no:0"], 2, "--health: é..no:0 cannot be listened on: "),
        (["app:worker", "--processes", "0"], 2, "--processes"),
        (["unknown:worker"], 3, "queue 'claimz' is not declared"),
        (["unknown:worker", "--processes", "2"], 3, "queue 'claimz' is not declared"),
        (["nofile:worker"], 3, "does not exist"),
        (["away:worker", "--until-idle"], 4, "PostgreSQL at 127.0.0.1:1, database claims is away"),
        (["away:worker", "--until-idle", "--processes", "2"], 4, "PostgreSQL at 127.0.0.1:1, database claims is away"),
    ],
)
def test_what_cannot_run_says_why(folder, broker, arguments, code, text) -> None:
    wrong = textwrap.dedent("""
        import filao
        worker = filao.Worker("{}")
        @worker.consumer("claimz")
        async def handle(message): ...
    """)
    (folder / "unknown.py").write_text(wrong.format("claims.db"))
    (folder / "away.py").write_text(wrong.format("postgresql://127.0.0.1:1/claims"))
    (folder / "nofile.py").write_text(wrong.format("no/such/folder/claims.db"))
    work = Work(folder, *arguments)
    assert work.ends() == code
    assert text in work.said()
    assert "Traceback" not in work.said()


def test_what_a_lifespan_raises_is_told_with_its_place(folder, broker) -> None:
    (folder / "fails.py").write_text(
        textwrap.dedent("""
            import filao
            worker = filao.Worker("claims.db")
            @worker.consumer("claims")
            async def handle(message): ...
            @worker.lifespan
            async def open_bank():
                raise ConnectionRefusedError(111, "refused")
                yield
        """)
    )
    work = Work(folder, "fails:worker")
    assert work.ends() == 1
    assert "in open_bank" in work.said()


@pytest.mark.parametrize("streams", [">&- 2>/dev/full", "<&- >&- 2>&-"])
def test_a_worker_whose_output_is_closed_or_full_works_as_any_other(folder, broker, streams) -> None:
    (folder / "app.py").write_text(APP.replace("grace=30", "grace=0.1"))
    process = subprocess.Popen(["sh", "-c", f"exec {sys.executable} -m filao work app:worker {streams}"], cwd=folder)
    try:
        broker.send_to_queue("claims", {"kind": "thread"})  # which is still there when all else has ended
        until((folder / "log").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
    assert broker.stats("claims").ready == 1


BY_NAME = """
import filao
worker = filao.Worker("claims.db")

@worker.consumer("claims")
async def handle(message: filao.Message) -> None:
    pass
"""


def test_processes_that_have_run_wait_for_what_prevents_a_new_start(folder, broker) -> None:
    (folder / "named.py").write_text(BY_NAME)
    with working(folder, "named:worker", "--processes", "2", "--health", "0", processes=2) as work:
        address = until(lambda: work.said().partition("health checks at ")[2].partition("\n")[0])
        pids = until(lambda: _pids(address, 2))
        broker.delete_queue("claims")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: work.said().count("ended with exit code 3; starting it again") >= 2)
        assert work.process.poll() is None
        broker.declare(filao.Queue("claims"))
        broker.send_to_queue("claims", 1)
        until(lambda: broker.stats("claims").acked == 1)


def _pids(address: str, count: int) -> list[int] | None:
    processes = _get(address)[1]["processes"]
    return (
        [process["pid"] for process in processes] if sum(process["ready"] for process in processes) == count else None
    )


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_stops_at_once_while_its_storage_is_away(folder, processes) -> None:
    (folder / "far.py").write_text(BY_NAME.replace("claims.db", "postgresql://nobody@127.0.0.1:1/claims"))
    work = Work(folder, "far:worker", "--processes", processes)
    try:
        until(lambda: work.said().count("reaching the engine fails") >= int(processes))
        work.signal(signal.SIGTERM)
        assert work.process.wait(10) == 0  # the grace alone is 30 s
    finally:
        work.process.kill()


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("import nothing_of_that_name", 2, "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def (", 2, "SyntaxError: invalid syntax"),
        ("import filao; filao.Queue('a b')", 3, "ConfigurationError: queue name 'a b'"),
    ],
)
def test_a_module_that_fails_shows_its_own_error_and_no_frame_of_ours_before_it(folder, source, code, error) -> None:
    (folder / "broken.py").write_text(source + "\n")
    work = Work(folder, "broken:worker")
    assert work.ends() == code
    assert error in work.said()
    frames = re.findall(r'File "(.*)", line', work.said())
    assert frames[0] == str(folder / "broken.py")


def test_a_worker_that_was_told_to_stop_says_what_it_waits_for(folder, broker) -> None:
    with working(folder, "app:worker") as work:
        broker.send_to_queue("claims", {"kind": "wait"})
        until(work.handled)
        work.signal(signal.SIGTERM)
        until(lambda: "stopping: 1 message may finish within 30 s" in work.said())
        (folder / "go").touch()
        assert work.ends() == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_success_is_logged_for_debugging_only(folder, broker, processes) -> None:
    with working(
        folder, "app:worker", "--processes", processes, "--log-level", "debug", processes=int(processes)
    ) as work:
        receipt = broker.send_to_queue("claims", {"kind": "fine"})
        until(lambda: f"message {receipt.id} of 'claims', attempt 1: acked" in work.said())
    with working(folder, "app:worker", "--processes", processes, processes=int(processes)) as work:
        broker.send_to_queue("claims", {"kind": "fine"})
        until(lambda: broker.stats("claims").acked == 2)
        work.signal(signal.SIGTERM)
        work.ends()
        assert ": acked" not in work.said()


def test_each_line_of_a_log_for_machines_is_json(folder, broker) -> None:
    with working(folder, "app:worker", "--log", "json", "--health", "0", "--metrics", "0") as work:
        work.signal(signal.SIGTERM)
        assert work.ends() == 0
    said = [json.loads(line)["text"] for line in work.said().splitlines()]
    assert (
        sum("receives from claims" in text or "metrics at" in text or "health checks at" in text for text in said) == 3
    )


LOUD = """
import threading, warnings
import filao

warnings.warn("old rules")
worker = filao.Worker(PATH)

class Odd:
    def __del__(self):
        raise ValueError("no end")

@worker.consumer(filao.Queue("claims"))
async def handle(message: filao.Message[int]) -> None:
    Odd()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
"""


def test_what_python_prints_by_itself_is_json_in_a_log_for_machines(folder, broker) -> None:
    broker.send_to_queue("claims", 1)
    for path, code, told in (
        ("claims.db", 0, ("UserWarning: old rules", "no end", "ZeroDivisionError", "nothing to do")),
        ("nowhere/claims.db", 3, ("UserWarning: old rules", "nowhere")),
    ):
        (folder / "loud.py").write_text(LOUD.replace("PATH", repr(path)))
        work = Work(folder, "loud:worker", "--log", "json", "--until-idle")
        assert work.ends() == code
        records = [json.loads(line) for line in work.said().splitlines()]
        said = "\n".join(f"{record['text']} {record.get('error')}" for record in records)
        assert [one for one in told if one not in said] == []


def test_the_doctor_tells_who_receives(folder, broker) -> None:
    with working(folder, "app:worker") as work:
        broker.send_to_queue("claims", {"kind": "wait"})
        until(work.handled)
        findings = [finding.text for finding in broker.doctor() if finding.subject == "processes"]
        assert any(f":{work.process.pid} receives here, and holds 1 message" in text for text in findings)
        (folder / "go").touch()


def test_the_doctor_tells_that_a_worker_is_healthy_and_that_it_is_not(folder, broker) -> None:
    def told() -> list[tuple[str, str]]:
        return [(finding.level, finding.text) for finding in broker.doctor() if finding.subject == "processes"]

    with (folder / "app.py").open("a") as app:
        app.write("from filao.worker import keeper, pulse\n")
        app.write("pulse.TICK = keeper.REPORT_EVERY = 0.1\nsys.modules['filao.worker.worker'].BLOCKED_AFTER = 0.5\n")
    with working(folder, "app:worker"):
        broker.send_to_queue("claims", {"kind": "plain"})
        until(lambda: any(level == "ok" and "its worker is ready and healthy" in text for level, text in told()))
        broker.send_to_queue("claims", {"kind": "block"})
        until(
            lambda: any("the event loop has been blocked for" in text for level, text in told() if level == "warning")
        )


def test_a_changed_source_file_starts_the_worker_anew(folder, broker) -> None:
    with working(folder, "app:worker", "--reload") as work:
        until(lambda: "receives from claims" in work.said())
        app = folder / "app.py"
        app.write_text(app.read_text().replace('kind = message["kind"]', 'kind = "new-" + message["kind"]'))
        until(lambda: work.said().count("receives from claims") == 2)
        broker.send_to_queue("claims", {"kind": "claim"})
        until(lambda: [kind for _, kind, _ in work.handled()] == ["new-claim"])
        assert "app.py has changed: starting anew" in work.said()
        work.signal(signal.SIGTERM)
        assert work.ends() == 0


def test_a_worker_consumes_only_the_queues_that_are_chosen(folder) -> None:
    with (folder / "app.py").open("a") as app:
        app.write(
            "\n@worker.consumer(filao.Queue('letters'))\ndef print_letter(message: filao.sync.Message) -> None: ...\n"
        )
    with working(folder, "app:worker", "--queue", "letters", "--processes", "2") as work:
        until(lambda: work.said().count("receives from letters\n") == 2)
    with working(folder, "app:worker", "--queue", "letter") as work:
        assert work.ends() == 3
        assert "no consumer of queue 'letter'; it has those of 'claims', 'letters'" in work.said()
