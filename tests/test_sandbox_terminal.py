"""The demo as its users run it, with real processes and a real SIGKILL; and its ledger, which is a pure function."""

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import cast, get_args

import pytest

import filao
import filao.sync
from filao.engine import Failure, State, instant
from filao.sandbox import crew, scenario, terminal
from filao.sandbox.board import Board
from filao.sandbox.claims import CLAIMS_MAX, BadClaimsError, from_csv, made_up
from filao.sandbox.crew import Crew, CrewError
from filao.sandbox.journal import Journal, Record, Tail, What, read_all
from filao.sandbox.ledger import Ledger, draw_up
from filao.sandbox.orders import QUEUE, PortalOrders, due, pace, trouble
from filao.sandbox.texts import LANGUAGES, TEXTS, Voice

pytestmark = pytest.mark.anyio

DEMO = [sys.executable, "-m", "filao.sandbox.terminal"]
PATIENCE = 30.0  # seconds after which a demo that hangs is killed, and its test fails
TOGETHER = 5  # demos that are played at once: they mostly wait
SHORT = ("--seconds", "1.6", "--count", "24", "--workers", "2")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@dataclass
class Ran:
    """What a demo said, and what it left."""

    code: int
    out: str
    err: str
    left: list[Path]

    @property
    def pids(self) -> set[int]:
        return {int(pid) for pid in re.findall(r"pid (\d+)", self.out)}

    def row(self, name: str) -> int:
        """Return a number of the ledger's first column."""
        found = re.search(rf"^ {name} +([\d,]+) ", self.out, re.MULTILINE)
        assert found, f"no {name!r} in {self.out}"
        return int(found[1].replace(",", ""))


def environment(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    return inherited | {"TMPDIR": str(folder), "TERM": "xterm"}


def demo(folder: Path, *arguments: str) -> Ran:
    """Run a demo to its end, its temporary files in a folder of its own."""
    done = subprocess.run(
        [*DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(folder),
        timeout=PATIENCE,
        check=False,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode(), list(folder.iterdir()))


def demo_on_terminal(folder: Path, *arguments: str) -> Ran:
    """Run a demo on a terminal of 100 columns and 30 rows, which gets all that it says."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with subprocess.Popen(
        [*DEMO, *arguments], stdin=inside, stdout=inside, stderr=inside, env=environment(folder), start_new_session=True
    ) as process:
        os.close(inside)
        screen = b"".join(iter(lambda: read_from(terminal), b""))
        os.close(terminal)  # should the demo hang, this ends it
        code = process.wait(PATIENCE)
    return Ran(code, COLOURS.sub("", screen.decode()), "", list(folder.iterdir()))


def read_from(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536) if select.select([terminal], [], [], PATIENCE)[0] else b""
    except OSError:  # Linux's way to say that nobody holds the other side any more
        return b""


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a demo beside the test, and leave none behind."""
    with subprocess.Popen(
        [*DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(folder),
        text=True,
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def said_until(process: "subprocess.Popen[str]", what: str) -> str:
    """Read until something was said."""
    assert process.stdout is not None
    said = ""
    while what not in said:
        line = process.stdout.readline()
        assert line, f"it ended before it said {what!r}: {said}"
        said += line
    return said


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that is only not yet buried does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # other processes set no events
            await asyncio.sleep(0.01)


# --- real runs -------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, ...]] = {
    "usual": (*SHORT, "--workers", "3"),
    "killed before the ack": (*SHORT, "--kill-when", "ack", "--language", "fr"),
    "nobody killed": (*SHORT, "--no-kill", "--workers", "1"),
    "restarted": (*SHORT, "--restart", "--workers", "1"),
    "many desks": (*SHORT, "--count", "2000"),
    "losing": (*SHORT, "--tamper", "lose"),
    "doubling": (*SHORT, "--tamper", "double"),
    "forgetting": (*SHORT, "--tamper", "forget"),
    **{language: (*SHORT, "--language", language) for language in LANGUAGES},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Play several demos at once, which saves time."""
    claims = tmp_path_factory.mktemp("claims")
    real = claims / "real.csv"
    real.write_text("IDpol,ClaimAmount\n" + "".join(f"{1000 + n},{n}.5\n" for n in range(1, 100)))
    wanted = RUNS | {
        "real claims": ("--seconds", "2", "--claims", str(real), "--limit", "20"),
        "kept": (*SHORT, "--file", str(claims / "kept.db")),
    }
    with ThreadPoolExecutor(TOGETHER) as threads:
        ran = {
            name: threads.submit(
                demo_on_terminal if name in LANGUAGES else demo, tmp_path_factory.mktemp("run"), *given
            )
            for name, given in wanted.items()
        }
        return {name: future.result() for name, future in ran.items()}


HONEST = ["usual", "killed before the ack", "nobody killed", "restarted", "many desks", "real claims", "kept"]
DISHONEST = ["losing", "doubling", "forgetting"]


@pytest.mark.parametrize("name", HONEST)
def test_a_demo_ends_with_a_ledger_that_balances(runs, name) -> None:
    ran = runs[name]
    assert ran.code == 0, ran.out + ran.err
    assert "≠" not in ran.out


@pytest.mark.parametrize("name", DISHONEST)
def test_a_falsified_journal_makes_the_ledger_and_the_program_fail(runs, name) -> None:
    ran = runs[name]
    assert ran.code == 1, ran.out + ran.err
    assert "≠" in ran.out
    assert "The ledger does NOT balance" in ran.out


@pytest.mark.parametrize("name", HONEST + DISHONEST)
def test_a_demo_leaves_no_process_and_no_file(runs, name) -> None:
    ran = runs[name]
    assert ran.left == []
    assert len(ran.pids) >= 2
    assert not any(map(is_alive, ran.pids))


def test_every_claim_that_is_sent_is_handled_or_a_dead_letter(runs) -> None:
    ran = runs["usual"]
    assert ran.row("sent") == 24
    assert ran.row("handled") + ran.row("dead letters") == 24
    assert ran.row("dead letters") >= 1
    assert ran.row("lost") == 0


def test_a_claim_that_fails_at_first_is_tried_again(runs) -> None:
    failed = re.search(r"claim (\d+), worker \d, attempt 1: the policy register did not answer", runs["usual"].out)
    assert failed
    assert f"claim {failed[1]} is a dead letter" not in runs["usual"].out


def test_a_killed_workers_claim_is_taken_over_by_another(runs) -> None:
    killed = re.search(r"worker (\d) \(pid \d+\) killed with SIGKILL while it held claim (\d+)", runs["usual"].out)
    taken = re.search(r"worker (\d) took over claim (\d+), attempt 2, after ", runs["usual"].out)
    assert killed
    assert taken
    assert taken[2] == killed[2]
    assert taken[1] != killed[1]
    assert (
        f"worker {killed[1]} was killed holding claim {killed[2]}; worker {taken[1]} took it over" in runs["usual"].out
    )


def test_a_worker_killed_between_its_work_and_its_ack_makes_a_claim_handled_twice_and_the_ledger_says_why(runs) -> None:
    ran = runs["killed before the ack"]
    assert ran.row("traités deux fois") == 1
    assert re.search(r"sinistre \d+ : l'agent \d tué entre son travail et son ack ; l'agent \d l'a refait", ran.out)


def test_a_killed_worker_can_be_replaced_by_a_new_one(runs) -> None:
    assert "worker 2 took over claim" in runs["restarted"].out
    assert re.search(r"^ worker 2 .*%", runs["restarted"].out, re.MULTILINE)


def test_with_no_kill_nobody_is_killed(runs) -> None:
    assert "killed" not in runs["nobody killed"].out


def test_workers_with_many_desks_lose_nothing_either(runs) -> None:
    ran = runs["many desks"]
    assert ran.row("handled") + ran.row("dead letters") == 2000
    assert "took over claim" in ran.out


def test_claims_of_a_csv_file_are_sent_up_to_a_limit(runs) -> None:
    assert runs["real claims"].row("sent") == 20


def test_the_queue_can_be_kept_in_a_file_to_look_into(runs) -> None:
    ran = runs["kept"]
    (kept,) = re.findall(r"filao stats (.*)", ran.err)
    with filao.sync.connect(kept) as broker:
        stats = broker.stats(QUEUE.name)
    assert (stats.sent, stats.acked, stats.dead) == (24, ran.row("handled"), ran.row("dead letters"))


def test_what_is_piped_on_has_no_colours(runs) -> None:
    assert "\x1b" not in runs["usual"].out


# --- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_terminal_shows_who_handles_what_and_then_the_ledger(runs, language) -> None:
    ran, say = runs[language], Voice(language)
    assert ran.code == 0, ran.out
    assert ran.left == []
    for key in ("col_claim", "evaluating", "waiting", "killed", "ready", "leased", "ledger"):
        assert say(key) in ran.out, key
    assert ran.out.rindex(SHOW_CURSOR) > ran.out.rindex(HIDE_CURSOR)


# --- ending early ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=str,
)
def test_a_demo_that_is_interrupted_leaves_no_process_and_no_file(tmp_path, number, code) -> None:
    with running(tmp_path / "demo") as process:
        said = said_until(process, "starts sending")
        process.send_signal(number)
        process.send_signal(number)  # an impatient user
        rest, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not any(is_alive(int(pid)) for pid in re.findall(r"pid (\d+)", said + rest))
    assert list((tmp_path / "demo").iterdir()) == []


async def test_when_the_demo_itself_is_killed_its_processes_go_home(tmp_path) -> None:
    with running(tmp_path / "demo") as process:
        said = "".join(said_until(process, what) for what in ("is ready", "is ready", "is ready"))
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", said)]
        process.kill()
        try:
            await until(lambda: not any(map(is_alive, pids)))
        finally:
            for pid in filter(is_alive, pids):  # should they stay, nobody else would end them
                os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_of_something_else_ends_the_demo_with_an_error(tmp_path) -> None:
    with running(tmp_path / "demo") as process:
        said = said_until(process, "is ready")
        (worker, pid) = re.findall(r"worker (\d) \(pid (\d+)\) is ready", said)[0]
        os.kill(int(pid), signal.SIGTERM)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"worker {worker} was ended by SIGTERM" in error
    assert list((tmp_path / "demo").iterdir()) == []


async def test_a_demo_that_takes_too_long_gives_up_and_says_how_far_it_came(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scenario, "DEADLINE", 0.5)
    play = scenario.Play(a_scenario(), tmp_path / "claims.db", tmp_path, Blind())
    with pytest.raises(scenario.TooSlowError) as caught:
        await play.perform()
    assert caught.value.handled < 100
    assert not any(is_alive(pid) for pid in (play.board.portal_pid, *(w.pid for w in play.board.workers.values())))


async def test_a_portal_that_fails_ends_the_demo_with_its_last_words(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(scenario, "PORTAL_MODULE", "filao.sandbox.no_such_module")
    with pytest.raises(CrewError, match=r"(?s)the portal ended with exit code 1.*no_such_module"):
        await scenario.Play(a_scenario(), tmp_path / "claims.db", tmp_path, Blind()).perform()


def a_scenario() -> scenario.Scenario:
    return scenario.Scenario(
        claims=made_up(1, 100), seed=1, workers=2, seconds=20, language="en", kill_when=None, restart=False
    )


class Blind:
    """Somebody who does not look."""

    def show(self, board: Board) -> None:
        pass


# --- wrong usage -----------------------------------------------------------------------------------------------------

CSV: dict[str, tuple[bytes | None, str]] = {
    "does not exist": (None, "No such file or directory. Give a CSV file with IDpol and ClaimAmount"),
    "is empty": (b"", "is empty"),
    "has only its columns": (b"IDpol,ClaimAmount\n", "no claim below"),
    "has other columns": (b"policy,amount\n1,2\n", "has no column IDpol and no ClaimAmount"),
    "lacks a column": (b"IDpol,amount\n1,2\n", "has no column ClaimAmount"),
    "has semicolons": (b"IDpol;ClaimAmount\n1;2\n", "between commas"),
    "is Latin-1": ("IDpol,ClaimAmount,town\n1,2,Orléans\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    "is not text": (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: byte 0x89 is not UTF-8"),
    "has a short line": (b"IDpol,ClaimAmount\n1,2\n3\n", "line 3: has 1 of the columns"),
    "has an amount in words": (b"IDpol,ClaimAmount\n1,much\n", "line 2: ClaimAmount is 'much'"),
    "has an amount that is no number": (b"IDpol,ClaimAmount\n1,NaN\n", "line 2: ClaimAmount is 'NaN'"),
    "has an amount below zero": (b"IDpol,ClaimAmount\n1,-5\n", "line 2: ClaimAmount is '-5'"),
    "has half a policy": (b"IDpol,ClaimAmount\n1.5,2\n", "line 2: IDpol is '1.5', and not a whole number"),
    "has an open quote": (b'IDpol,ClaimAmount\n1,"2\n', "line 2: unexpected end of data"),
    "has an endless line": (b"IDpol,ClaimAmount\n" + b"1" * 70_000, "line 2: is longer than"),
}


@pytest.mark.parametrize("name", CSV)
def test_a_csv_file_that_cannot_be_used_is_refused_with_its_reason(tmp_path, name) -> None:
    content, reason = CSV[name]
    path = tmp_path / "claims.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadClaimsError) as refused:
        from_csv(path, None)
    assert str(refused.value).startswith(str(path))
    assert reason in str(refused.value)


def test_a_folder_is_no_csv_file(tmp_path) -> None:
    with pytest.raises(BadClaimsError, match="Is a directory"):
        from_csv(tmp_path, None)


def test_a_csv_file_may_have_a_mark_more_columns_empty_lines_and_exponents(tmp_path) -> None:
    path = tmp_path / "claims.csv"
    path.write_bytes(b'\xef\xbb\xbfid, ClaimAmount ,IDpol\r\n1,1204.005,7\r\n\r\n"2","1e+05","1e+06"\r\n')
    read = [(claim.number, claim.policy, claim.amount) for claim in from_csv(path, None)]
    assert read == [(1, 7, 120_400), (3, 1_000_000, 10_000_000)]


def test_more_claims_than_fit_into_a_minute_are_refused_unless_they_are_limited(tmp_path) -> None:
    path = tmp_path / "claims.csv"
    path.write_text("IDpol,ClaimAmount\n" + "1,2\n" * (CLAIMS_MAX + 1))
    with pytest.raises(BadClaimsError, match="--limit"):
        from_csv(path, None)
    assert len(from_csv(path, CLAIMS_MAX)) == CLAIMS_MAX


WRONG_USAGE = {
    "a bad file": (["--claims", "no-such.csv"], "no-such.csv: No such file or directory"),
    "a single worker to be killed": (["--workers", "1"], "nobody would take over"),
    "no workers": (["--workers", "0"], "--workers"),
    "no claims": (["--count", "0"], "--count"),
    "a count of a file": (["--claims", "a.csv", "--count", "3"], "--limit"),
    "a limit of nothing": (["--limit", "3"], "--claims"),
    "another language": (["--language", "de"], "--language"),
    "a file that exists": (["--file", os.devnull], "exists"),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_is_told_and_has_its_own_exit_code(monkeypatch, capsys, name) -> None:
    arguments, reason = WRONG_USAGE[name]
    monkeypatch.setattr(sys, "argv", ["terminal", *arguments])
    with pytest.raises(SystemExit) as ended:
        terminal.main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert reason in said.err


def test_a_file_in_a_folder_that_does_not_exist_is_told(tmp_path) -> None:
    ran = demo(tmp_path / "demo", "--file", str(tmp_path / "nowhere" / "claims.db"))
    assert ran.code == 1
    assert "does not exist; create it first" in ran.err
    assert ran.left == []


# --- the ledger, a pure function -------------------------------------------------------------------------------------

KILL = "1 killed 0"
CLAIM_7 = "0 sent 7; 1 received 7; 1 handled 7; 1 acked 7"
CLAIM_8 = "0 sent 8; 2 received 8; 2 handled 8; 2 acked 8"


def records_of(story: str) -> list[Record]:
    """Write down a story of parts like "1 received 7", or "2 acked 7 #2" for a second attempt."""
    records = []
    for at, part in enumerate(filter(None, map(str.strip, story.split(";")))):
        who, what, claim, *attempt = part.split()
        assert what in get_args(What)
        message = "" if what == "killed" else f"m{claim}"
        number = int(attempt[0].removeprefix("#")) if attempt else 1
        records.append(Record(float(at + 1), int(who), cast("What", what), message, int(claim), number))
    return records


def stats_of(**counters: int) -> filao.QueueStats:
    """Return an empty queue's counters."""
    nothing = dict.fromkeys(("ready", "delayed", "blocked", "leased", "dead"), 0)
    return filao.QueueStats(QUEUE.name, paused=False, oldest_ready_age=None, **(nothing | counters))


def dead_letter(claim: int, *, attempts: int = 3) -> filao.StoredMessage:
    failure = Failure(attempts, instant(0), "nacked", "Traceback …\nRegisterError: policy 5 is unknown\n", "host:1")
    return filao.StoredMessage(
        id=f"m{claim}",
        queue=QUEUE.name,
        state=State.DEAD,
        body={"number": claim},
        headers={},
        attempts=attempts,
        priority=0,
        group=None,
        dedup_key=None,
        sent_at=instant(0),
        at=instant(0),
        expires_at=None,
        reason="max_attempts",
        history=(failure,),
    )


def ledger_of(story: str, *dead: filao.StoredMessage, planned: int = 2, desks: int = 1, **counters: int) -> Ledger:
    return draw_up(records_of(story), dead, stats_of(**counters), planned=planned, desks=desks)


def faults_of(ledger: Ledger) -> set[str]:
    return {fault.key for fault in ledger.faults}


def test_the_ledger_of_an_ordinary_day_balances() -> None:
    ledger = ledger_of(f"{CLAIM_7}; {CLAIM_8}", sent=2, received=2, acked=2)
    assert ledger.balances
    assert (ledger.sent, ledger.handled, ledger.lost, ledger.doubles) == (2, 2, (), ())
    assert [(share.worker, share.handled, share.of_all) for share in ledger.shares] == [(1, 1, 0.5), (2, 1, 0.5)]


def test_a_confirmed_claim_that_nobody_handled_is_lost() -> None:
    ledger = ledger_of(f"{CLAIM_7}; 0 sent 8", sent=2, received=1, acked=1)
    assert ledger.lost == (8,)
    assert faults_of(ledger) == {"fault_lost"}


def test_a_claim_that_the_engine_says_was_acked_but_nobody_handled_is_lost() -> None:
    ledger = ledger_of(f"{CLAIM_7}; 0 sent 8", sent=2, received=2, acked=2)
    assert faults_of(ledger) == {"fault_lost", "fault_count"}


def test_a_claim_received_by_a_killed_worker_and_never_again_is_lost() -> None:
    ledger = ledger_of(f"{CLAIM_8}; 0 sent 7; 1 received 7; {KILL}", sent=2, received=2, acked=2)
    assert ledger.lost == (7,)
    assert not ledger.balances


def test_a_dead_letter_is_not_lost_and_keeps_its_reason() -> None:
    tries = "; ".join(f"{worker} received 8 #{worker}; {worker} nacked 8 #{worker}" for worker in (1, 2, 3))
    ledger = ledger_of(f"{CLAIM_7}; 0 sent 8; {tries}", dead_letter(8), sent=2, received=4, acked=1, nacked=3, dead=1)
    assert ledger.balances
    assert [(d.claim, d.reason, d.attempts, d.error) for d in ledger.dead] == [
        (8, "max_attempts", 3, "policy 5 is unknown")
    ]


def test_a_claim_handled_twice_is_explained_when_its_worker_was_killed_before_the_ack() -> None:
    story = f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7; {KILL}; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    ledger = ledger_of(story, sent=2, received=3, acked=2, lost=1)
    assert ledger.balances
    assert [(d.claim, d.first, d.second, d.cause) for d in ledger.doubles] == [(7, 1, 2, "killed")]
    assert [(t.claim, t.killed, t.worker, t.attempt) for t in ledger.takeovers] == [(7, 1, 2, 2)]


def test_a_claim_handled_twice_is_explained_when_its_worker_overslept() -> None:
    story = (
        f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7; 2 received 7 #2; 1 refused 7; 2 handled 7 #2; 2 acked 7 #2"
    )
    ledger = ledger_of(story, sent=2, received=3, acked=2, lost=1)
    assert ledger.balances
    assert [double.cause for double in ledger.doubles] == ["refused"]


def test_a_claim_handled_twice_by_workers_that_live_is_a_fault() -> None:
    story = f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    assert "fault_double" in faults_of(ledger_of(story, sent=2, received=3, acked=2, lost=1))


def test_a_claim_handled_twice_in_one_delivery_is_a_fault() -> None:
    story = f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7; 1 handled 7; 1 acked 7"
    assert faults_of(ledger_of(story, sent=2, received=2, acked=2)) == {"fault_double"}


def test_a_claim_that_comes_back_after_its_ack_is_a_fault_even_if_its_worker_was_killed_later() -> None:
    story = f"{CLAIM_8}; {CLAIM_7}; {KILL}; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    ledger = ledger_of(story, sent=2, received=3, acked=2, lost=1)
    assert {"fault_double", "fault_acked_but_back"} <= faults_of(ledger)


def test_a_kill_explains_no_more_claims_than_the_worker_had_in_hand() -> None:
    story = "".join(f"0 sent {n}; 1 received {n}; 1 handled {n};" for n in (7, 8))
    story += KILL + "".join(f"; 2 received {n} #2; 2 handled {n} #2; 2 acked {n} #2" for n in (7, 8))
    counters = {"sent": 2, "received": 4, "acked": 2, "lost": 2}
    assert faults_of(ledger_of(story, desks=1, **counters)) == {"fault_wordless"}
    assert ledger_of(story, desks=2, **counters).balances


def test_what_a_killed_worker_could_not_write_down_is_no_fault() -> None:
    unsaid_ack = f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7; {KILL}"
    assert ledger_of(unsaid_ack, sent=2, received=2, acked=2).balances
    unsaid_delivery = f"{CLAIM_8}; 0 sent 7; {KILL}; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    assert ledger_of(unsaid_delivery, sent=2, received=3, acked=2, lost=1).balances
    unsaid_nack = f"{CLAIM_8}; 0 sent 7; 1 received 7; {KILL}; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    assert ledger_of(unsaid_nack, sent=2, received=3, acked=2, nacked=1).balances


def test_an_ack_that_nobody_wrote_down_is_a_fault_when_nobody_was_killed() -> None:
    story = f"{CLAIM_8}; 0 sent 7; 1 received 7; 1 handled 7"
    assert faults_of(ledger_of(story, sent=2, received=2, acked=2)) == {"fault_count", "fault_wordless"}


def test_a_delivery_that_nobody_wrote_down_is_a_fault_when_nobody_was_killed() -> None:
    story = f"{CLAIM_8}; 0 sent 7; 2 received 7 #2; 2 handled 7 #2; 2 acked 7 #2"
    assert faults_of(ledger_of(story, sent=2, received=3, acked=2, lost=1)) == {"fault_count"}


def test_an_ack_that_came_late_but_was_accepted_is_no_fault() -> None:
    assert ledger_of(f"{CLAIM_7}; {CLAIM_8}", sent=2, received=2, acked=2, lost=1, late=1).balances


@pytest.mark.parametrize(
    ("story", "fault"),
    [
        (CLAIM_7, "fault_not_sent"),
        (f"{CLAIM_7}; {CLAIM_8}; 0 sent 8", "fault_sent_twice"),
        (f"{CLAIM_7}; {CLAIM_8}; 1 received 9; 1 handled 9; 1 acked 9", "fault_never_sent"),
        (f"{CLAIM_7}; 0 sent 8; 2 handled 8; 2 acked 8", "fault_never_received"),
    ],
)
def test_a_story_that_cannot_be_true_is_a_fault(story: str, fault: str) -> None:
    assert fault in faults_of(ledger_of(story, sent=2, received=2, acked=2))


def test_a_claim_that_was_handled_and_acked_and_is_a_dead_letter_is_a_fault() -> None:
    ledger = ledger_of(f"{CLAIM_7}; {CLAIM_8}", dead_letter(8, attempts=1), sent=2, received=2, acked=2, dead=1)
    assert "fault_handled_and_dead" in faults_of(ledger)


@pytest.mark.parametrize("counter", ["sent", "received", "acked", "nacked", "lost", "dead", "ready", "leased"])
def test_a_counter_of_the_engine_that_differs_is_a_fault(counter: str) -> None:
    counters = {"sent": 2, "received": 2, "acked": 2}
    counters[counter] = counters.get(counter, 0) + 1
    assert faults_of(ledger_of(f"{CLAIM_7}; {CLAIM_8}", **counters)) == {"fault_count"}


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_claims_and_the_same_trouble() -> None:
    assert made_up(3, 50) == made_up(3, 50)
    assert made_up(3, 50) != made_up(4, 50)
    assert trouble(3, made_up(3, 50)) == trouble(3, made_up(3, 50))


@pytest.mark.parametrize("count", [1, 2, 10, 300, 60_000])
def test_at_least_one_claim_has_an_unknown_policy_and_it_is_no_other_trouble(count: int) -> None:
    silent, unknown = trouble(7, made_up(7, count))
    assert len(unknown) >= 1
    assert not set(silent) & set(unknown)


@pytest.mark.parametrize("count", [1, 12, 300, 26_639, CLAIMS_MAX])
@pytest.mark.parametrize("workers", [1, 3, 12])
def test_the_pace_leaves_time_for_the_rest(count: int, workers: int) -> None:
    chosen = pace(count, workers=workers, seconds=20)
    assert 0 < chosen.sending <= 16
    assert chosen.desks >= 1
    assert chosen.work * count / (workers * chosen.desks) <= chosen.sending


def test_the_portal_sends_ever_more_until_all_is_sent() -> None:
    shares = [due(step / 100) for step in range(102)]
    assert shares == sorted(shares)
    assert (shares[0], shares[100], shares[101]) == (0, 1, 1)


def test_a_journal_is_read_up_to_its_last_whole_line(tmp_path) -> None:
    path = tmp_path / "worker-1.journal"
    tail = Tail(path)
    assert tail.read() == []
    journal = Journal(path, 1)
    journal.write("received", message="m7", claim=7, attempt=1)
    os.write(file := os.open(path, os.O_WRONLY | os.O_APPEND), b'{"at":')
    assert [record.claim for record in tail.read()] == [7]
    assert tail.read() == []
    os.write(file, b'5.0,"who":1,"what":"acked","claim":8}\n')
    assert [record.claim for record in tail.read()] == [8]
    assert [record.claim for record in read_all(tmp_path)] == [8, 7]
    journal.close()
    os.close(file)


def test_a_process_that_holds_nothing_is_not_killed(tmp_path) -> None:
    orders = PortalOrders(str(tmp_path / "claims.db"), str(tmp_path), str(tmp_path / "claims.json"), 60.0)
    (tmp_path / "claims.json").write_text("[]")
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(QUEUE)
    with Crew(tmp_path) as started:
        pid = started.start(0, scenario.PORTAL_MODULE, orders)
        assert started.kill_if(0, lambda: False) is None
        started.send_home()
    assert not is_alive(pid)


def test_a_process_that_does_not_go_home_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(crew, "HOME_WITHIN", 0.1)
    pids: list[int] = []

    def strand() -> None:
        with Crew(tmp_path) as stuck:
            pids.append(stuck.start(0, scenario.PORTAL_MODULE, PortalOrders("", "", "", 1.0)))
            os.kill(pids[0], signal.SIGSTOP)

    with pytest.raises(CrewError, match="the portal did not end within"):
        strand()
    left = list(filter(is_alive, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_has_the_same_places_in_both_languages(key: str) -> None:
    places = [{name for _, name, _, _ in Formatter().parse(text) if name} for text in TEXTS[key]]
    assert places[0] == places[1]


def test_numbers_are_written_as_their_language_does() -> None:
    english, french = Voice("en"), Voice("fr")
    assert (english.number(12345.67, 1), french.number(12345.67, 1)) == ("12,345.7", "12\xa0345,7")
    assert (english.euros(120_400), french.euros(120_400)) == ("€1,204", "1\xa0204\xa0€")
    assert (english.span(0.0123), french.span(1.25)) == ("12\xa0ms", "1,2\xa0s")
