"""`filao work`: run a worker that a module defines, in this process or in several."""

import asyncio
import dataclasses
import importlib
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import click

from filao.cli import logs
from filao.cli.health import health_check
from filao.cli.metrics import TEXT
from filao.cli.pages import Page, address_of, served, shown_address
from filao.cli.shell import usage
from filao.cli.target import NOTHING, found_in, imported
from filao.engine import OpenAgain
from filao.errors import FilaoError
from filao.process import check_threads, flush_output, this_python
from filao.worker.signals import told_by_signals
from filao.worker.supervisor import IDLE, Orders, Supervisor, report
from filao.worker.worker import Worker

LOOKED_EVERY = 0.5  # seconds between two looks at the source files
SOURCES_MAX = 10_000  # source files that are watched: some 50 ms for each look
NOT_WATCHED = ("__pycache__", "node_modules", "venv", "site-packages")
ENDS_WITHIN = 1.0  # seconds for threads of handlers, when the worker has stopped


@click.command()
@click.argument("target", metavar="MODULE:WORKER")
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="How many share the work.")
@click.option("--max-messages", type=click.IntRange(1), help="Replace a process after so many messages.")
@click.option("--max-memory", type=click.IntRange(1), metavar="MB", help="Replace a process that has grown so large.")
@click.option("--health", metavar="[HOST:]PORT", help="Answer health checks by HTTP, on loopback unless HOST is given.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged: debug tells of each success, info of each decision.",
)
@click.option(
    *("--log", "log_form"),
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or an object for each, with queue, message_id and attempt.",
)
@click.option("--queue", "queues", multiple=True, metavar="QUEUE", help="Only this one of its queues. May be repeated.")
@click.option("--until-idle", is_flag=True, help="End when nothing is ready and no handler runs; for cron.")
@click.option("--reload", is_flag=True, help="Start anew when a .py file here changes; for development.")
@click.option("--metrics", metavar="[HOST:]PORT", help="Serve measures to Prometheus; the nth process at PORT + n - 1.")
@click.option("--report-to", type=int, hidden=True)
@click.option("--slot", type=int, default=1, hidden=True)
def work(
    *,
    target: str,
    queues: tuple[str, ...],
    until_idle: bool,
    reload: bool,
    processes: int,
    max_messages: int | None,
    max_memory: int | None,
    health: str | None,
    log_level: str,
    log_form: str,
    metrics: str | None,
    report_to: int | None,
    slot: int,
) -> int:
    """Run a filao.Worker: app:worker is `worker` in app.py.

    It runs until SIGTERM, Ctrl-C or the end of its terminal. The first signal stops it gracefully: it receives no more,
    gives back what has not begun, and finishes the rest within the worker's grace. The second stops it at once. Nothing
    is lost either way.

    With --until-idle it also ends once it finds nothing to receive and none of its handlers runs. What is delayed, what
    comes again after a backoff and what other processes hold is left. It does not wait for a storage that is away, full
    or read-only from its start on.

    With --processes, --max-messages, --max-memory or --reload a supervisor starts each process anew when it ends, but
    not one that was idle. While the storage is away it waits for it, for ever; with --until-idle it does neither for a
    process that could never receive. Exit codes are those of `filao --help`; it is 0 after a signal and when it was
    idle, whatever became of the messages.
    """
    logs.begin(log_level, log_form)
    address = None if health is None else address_of("--health", health)
    measured_at = None if metrics is None else _measured_at(metrics)
    worker = _load(target)
    check_threads()  # here, since a supervisor would start a process that fails anew
    if queues:
        worker.only(queues)
    limits = [(name, value) for name, value in (("messages", max_messages), ("memory", max_memory)) if value]
    if report_to is None and (processes > 1 or limits or reload):
        command = [*_python(), "-m", "filao", "work", target]
        command += ["--log-level", log_level, "--log", log_form]
        command += [part for queue in queues for part in ("--queue", queue)]
        command += ["--metrics", metrics] if metrics else []
        command += ["--until-idle"] * until_idle
        for name, value in limits:
            command += [f"--max-{name}", str(value)]
        supervisor = Supervisor(command, processes, until_idle=until_idle)
        return asyncio.run(_supervise(supervisor, address, reload=reload))
    with _measured(worker, measured_at, slot):
        is_used_up = _is_used_up(worker, max_messages, max_memory)
        return asyncio.run(_work(worker, is_used_up, report_to, address, until_idle=until_idle))


def _python() -> list[str]:
    """Return the command of the processes' Python, which finds there the same modules as this one does here.

    It does not look in the current folder, unless this is `python -m filao` itself: a `queue.py` there would take the
    place of Python's own. And it looks in the archive in which this Filao lies, if it does: PYTHONPATH, which they and
    their own children inherit, begins with that.
    """
    here = Path(__file__).absolute().parents[2]
    is_archived = not here.is_dir()
    if is_archived:
        given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(here), given)))
    begun = getattr(sys.modules["__main__"], "__spec__", None)
    is_module = begun is not None and begun.name == "filao.__main__"
    looks_here = is_module and not sys.flags.safe_path
    return this_python(told_where=is_archived) + ["-P"] * (not looks_here)


async def _supervise(supervisor: Supervisor, address: tuple[str, int] | None, *, reload: bool) -> int:
    with _checked(address, supervisor.state):
        watching = asyncio.create_task(_reload(supervisor, Path.cwd())) if reload else None
        try:
            return await supervisor.run()
        finally:
            if watching is not None:
                watching.cancel()


async def _reload(supervisor: Supervisor, folder: Path) -> None:
    """Renew the processes whenever a source file below a folder changes, comes or goes."""
    seen = _sources(folder)
    while True:
        await asyncio.sleep(LOOKED_EVERY)
        now = _sources(folder)
        if now != seen:
            changed = min({path for path, _ in now ^ seen}, default="")
            logs.say(f"{changed} has changed: starting anew")
            supervisor.renew()
        seen = now


def _sources(folder: Path) -> set[tuple[str, int]]:
    """Return the source files below a folder with their times, except those in hidden folders and environments."""
    found: set[tuple[str, int]] = set()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NOT_WATCHED]
        for name in names:
            if name.endswith(".py") and len(found) < SOURCES_MAX:
                with suppress(OSError):  # it has just gone
                    path = Path(place, name)
                    found.add((str(path.relative_to(folder)), path.stat().st_mtime_ns))
    return found


async def _work(
    worker: Worker,
    is_used_up: Callable[[], bool],
    report_to: int | None,
    address: tuple[str, int] | None,
    *,
    until_idle: bool,
) -> int:
    executor = ThreadPoolExecutor(thread_name_prefix="filao to_thread")
    asyncio.get_running_loop().set_default_executor(executor)
    orders, is_alone = Orders(worker.stop), report_to is None
    refuse = report(worker, worker.grace, report_to, orders) if report_to is not None else lambda: None
    started = asyncio.Event()

    def ready() -> None:
        started.set()
        logs.say(f"process {os.getpid()} receives from {', '.join(worker.queues)}")

    signals = nullcontext() if is_alone else told_by_signals(orders.stop)
    with _checked(address, lambda: dataclasses.asdict(worker.status())), signals:
        try:
            was_idle = await worker.run(until=is_used_up, ready=ready, signals=is_alone, until_idle=until_idle)
        except FilaoError as error:
            if not started.is_set() or (until_idle and not isinstance(error, OpenAgain)):
                refuse()
            raise
        except OSError as error:  # a lifespan's: `main` would tell it as one of ours, without its place
            traceback.print_exception(error)
            return 1
    if was_idle:
        logs.say(f"process {os.getpid()} has nothing to do: it ends")
    if not is_alone or worker.has_hung or not _has_ended(executor):
        flush_output()
        code = IDLE if was_idle and not is_alone else 0
        os._exit(code)  # what handlers left running in threads must not keep the process
    return 0


def _has_ended(executor: ThreadPoolExecutor) -> bool:
    """Return whether the threads of `asyncio.to_thread` end in time; a cancelled call leaves its thread running."""
    ending = threading.Thread(target=executor.shutdown, daemon=True)
    ending.start()
    ending.join(ENDS_WITHIN)
    return not ending.is_alive()


def _measured_at(metrics: str) -> tuple[str, int]:
    """Return the address of --metrics, checked at once, since a supervisor would start a process that fails anew."""
    importlib.import_module("filao.prometheus")  # or the error that says which extra it takes
    return address_of("--metrics", metrics)


@contextmanager
def _measured(worker: Worker, address: tuple[str, int] | None, slot: int) -> Generator[None]:
    """Serve the metrics of a worker's process."""
    if address is None:
        yield
        return
    from filao.prometheus.worker import WorkerMetrics

    host, port = address
    port = min(port + slot - 1, 65_535) if port else 0
    measures = WorkerMetrics()
    worker.observers.append(measures)

    async def answer(path: bytes) -> Page:
        return Page(measures.text(), TEXT)

    with served("--metrics", host, port, answer, name="filao metrics") as listening:
        logs.say(f"metrics at {shown_address(host, listening)}metrics")
        yield


@contextmanager
def _checked(address: tuple[str, int] | None, state: Callable[[], Mapping[str, object]]) -> Generator[None]:
    if address is None:
        yield
        return
    with health_check(*address, state) as port:
        logs.say(f"health checks at http://{address[0]}:{port}/")
        yield


def _load(target: str) -> Worker:
    """Import the worker that MODULE:WORKER names, the current folder first."""
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        raise usage(f"{target!r} names no worker: give MODULE:WORKER, such as app:worker for `worker` in app.py")
    module = imported(name)
    found = found_in(module, attribute)
    if isinstance(found, Worker):
        return found
    problem = (
        f"there is no {attribute!r} in {name!r}"
        if found is NOTHING
        else f"{attribute!r} in {name!r} is {found!r}; it must be a filao.Worker"
    )
    there = [f"{name}:{one}" for one, value in vars(module).items() if isinstance(value, Worker)]
    raise usage(f"{problem}. The module has {', '.join(there)}" if there else problem)


def _is_used_up(worker: Worker, max_messages: int | None, max_memory: int | None) -> Callable[[], bool]:
    """Return a function that tells whether this process has handled, or grown to, as much as it may."""

    def is_used_up() -> bool:
        return bool(
            (max_messages and worker.handled >= max_messages)
            or (max_memory and worker.handled % 16 == 0 and _memory() >= max_memory * 1_000_000)
        )

    return is_used_up


def _memory() -> int:
    """Return this process's resident memory in bytes; where the system does not tell, its highest so far."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
