"""Step 11: the learner's own consumer, run for real as three competing processes, and checked for what the lesson
has taught.

Each check has a queue file of its own. It looks at what happened outside: the table of payments, the engine's
counters, and what the processes wrote down; and it says why it is red. Whatever the code does, loops, exits or
errors, is told within a bounded time. Each process has a guard: what the code starts itself ends with it.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

import filao
from filao.sandbox.crew import HOME_WITHIN, own_environment
from filao.sandbox.guard import descendants, kill_below
from filao.sandbox.journal import Record, Tail, journal_of
from filao.sandbox.orders import CLAIMS, PAYMENTS, Claim
from filao.sandbox.trap import Trial

CHECKS = ("after_work", "survives", "nacks", "nothing_lost", "once")
PROCESSES = 3
CODE_MAX = 40_000  # characters
STUCK_AFTER = 20.0  # seconds in which nothing has happened
BUSY_AFTER = 4.0  # seconds of CPU that a process has used when nothing happens: it loops
CHECK_MAX = 120.0  # seconds that one check takes at most
DESK = "desk"  # the folder in which the code runs, so that files that it writes cannot overwrite ours
CROWD = 30  # processes of a run that are too many: three are ours, and a consumer needs only a few
COUNT_EVERY = 0.5  # seconds between two looks at how many there are
LOOK_EVERY = 0.05  # seconds
SHOWN_MAX = 3_000  # characters of what the processes print
HOPELESS = ("stuck", "loops", "exited", "ended", "vanished", "crowd")  # why the other checks are not made
SHARED = "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}"  # between the shares of consumers, which stay in one line
ALL, KILLED = 100, 30  # claims of `nothing_lost`, and the one of them whose first holder is killed

State = Literal["open", "running", "green", "red"]

log: logging.Logger = logging.getLogger("filao.sandbox")


class RedError(Exception):
    """A check failed; `key` is that of the page's text that says why."""

    def __init__(self, key: str, **values: str | int) -> None:
        super().__init__(key)
        self.key = key
        self.values = values


@dataclass(frozen=True, slots=True)
class Result:
    """How a check stands, and why; `key` and `values` are a text of the page."""

    state: State = "open"
    key: str = ""
    values: dict[str, str | int] = field(default_factory=dict[str, str | int])


class Exercise:
    """The checks of one room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # otherwise nobody would own what starts while another check stops
        self.results: dict[str, Result] = {check: Result() for check in CHECKS}
        self.output: str = ""
        """The last output of the processes."""
        self.code: str = ""
        self.started: int = 0
        """How often code was checked."""

    @property
    def is_running(self) -> bool:
        """Whether checks are going on."""
        return self._task is not None and not self._task.done()

    async def start(self, code: str) -> None:
        """Check some code, in place of what is being checked."""
        async with self._turn:
            await self._stop()
            self.started += 1
            self.code = code
            self.results = {check: Result() for check in CHECKS}
            self.output = ""
            self._task = asyncio.create_task(self._check_all())

    async def stop(self) -> None:
        """End what is running; none of its processes is left."""
        async with self._turn:
            await self._stop()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None

    async def cancel(self) -> None:
        """End what is running, and say so."""
        if self.is_running:
            await self.stop()
            self.results = {
                check: Result("red", "stopped") if result.state in ("running", "open") else result
                for check, result in self.results.items()
            }

    async def _check_all(self) -> None:
        try:
            program = self._written()
        except RedError as error:
            self.results = {check: Result("red", "not_run") for check in CHECKS}
            self.results[CHECKS[0]] = Result("red", error.key, error.values)
            return
        except OSError as error:  # the disk is full, say
            self.results = {check: Result("red", "storage", {"error": str(error)}) for check in CHECKS}
            return
        for check in CHECKS:
            self.results[check] = Result("running")
            self.results[check] = await self._checked(check, program)
            if self.results[check].key in HOPELESS:
                for rest in CHECKS[CHECKS.index(check) + 1 :]:
                    self.results[rest] = Result("red", "not_run")
                return

    def _written(self) -> Path:
        """Write the code into its file. Raises `RedError` when it is not Python, or too long."""
        if len(self.code) > CODE_MAX:
            raise RedError("too_long", most=CODE_MAX)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        program = self._folder / "my_consumer.py"
        program.write_text(self.code, encoding="utf-8", errors="replace")
        try:
            compile(self.code, str(program), "exec")
        except SyntaxError as error:
            if error.lineno:
                raise RedError("syntax", line=error.lineno, error=str(error.msg)) from error
            raise RedError("no_python", error=str(error.msg)) from error
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise RedError("no_python", error=str(error) or type(error).__name__) from error
        return program

    async def _checked(self, check: str, program: Path) -> Result:
        self._runs += 1
        verify: Callable[[Run], Coroutine[Any, Any, Result]] = _VERIFY[check]
        try:
            async with asyncio.timeout(CHECK_MAX), _running(self._folder / f"run-{self._runs}", program) as run:
                try:
                    return await verify(run)
                finally:
                    self.output = run.printed() or self.output
        except RedError as error:
            return Result("red", error.key, error.values)
        except TimeoutError:
            return Result("red", "stuck", {"seconds": round(CHECK_MAX)})
        except (filao.FilaoError, sqlite3.Error, OSError) as error:
            return Result("red", "storage", {"error": str(error)})
        except Exception as error:  # an error of ours, not the learner's: it is shown, and the other checks go on
            log.warning("the check %s failed: %r", check, error)
            return Result("red", "storage", {"error": repr(error)})


# --- one run ---------------------------------------------------------------------------------------------------------


class Run:
    """Processes of the learner's code, on a separate queue file."""

    def __init__(self, folder: Path, program: Path, broker: filao.Broker, business: sqlite3.Connection) -> None:
        self._folder = folder
        self._program = program
        self._broker = broker
        self._business = business
        self._tails: list[Tail] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.records: list[Record] = []

    def start(self, count: int, *, kill_at_ack: int = 0, endless: int = 0) -> None:
        """Start processes; see `Trial`."""
        for number in range(len(self.processes) + 1, len(self.processes) + count + 1):
            file = str(self._folder / "claims.db")
            trial = Trial(str(self._program), file, str(self._folder), number, kill_at_ack, endless)
            command = [
                sys.executable,
                "-P",
                "-X",
                "utf8",
                "-m",
                "filao.sandbox.trap",
                msgspec.json.encode(trial).decode(),
            ]
            with (self._folder / f"{number}.out").open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    cwd=self._folder / DESK,
                    env=own_environment(),
                    start_new_session=True,
                )
            self.processes.append(process)
            self._tails.append(Tail(journal_of(self._folder, number)))

    async def send(self, count: int = 1, *, effort: float = 0.05, policy: int = 12, first: int = 1) -> None:
        """Send claims."""
        claims = [Claim(number, policy, 100 * number, "storm", effort) for number in range(first, first + count)]
        await self._broker.send_many(CLAIMS, [msgspec.to_builtins(claim) for claim in claims])

    async def stats(self) -> filao.QueueStats:
        """Return the engine's counters."""
        return await self._broker.stats(CLAIMS)

    async def dead_reasons(self) -> list[str]:
        """Return why messages are dead."""
        return [str(letter.reason) for letter in await self._broker.dead_letters(CLAIMS)]

    def payments(self, claim: int | None = None) -> int:
        """Return how many payments there are, of one claim or of all."""
        where = "" if claim is None else f" WHERE claim = {claim:d}"
        return int(self._business.execute(f"SELECT count(*) FROM payment{where}").fetchone()[0])

    def paid(self) -> int:
        """Return how many claims were paid, once or more."""
        return int(self._business.execute("SELECT count(DISTINCT claim) FROM payment").fetchone()[0])

    def noted(self, what: str) -> list[Record]:
        """Return the records of a kind in the processes' journals."""
        for tail in self._tails:
            self.records += tail.read()
        return [record for record in self.records if record.what == what]

    def kill(self, number: int) -> None:
        """Kill a process and all that it has started, as their guard does when its input ends."""
        _let_go(self.processes[number - 1])
        _see_ended(self.processes[number - 1])

    def end(self) -> None:
        """Kill all processes, and what they have started."""
        for process in self.processes:
            _let_go(process)
        for process in self.processes:
            _see_ended(process)

    def _started(self) -> list[int]:
        """Return all processes of the learner's code; none where the system does not tell."""
        return descendants(process.pid for process in self.processes)

    async def until(self, reached: Callable[[filao.QueueStats], bool]) -> filao.QueueStats:
        """Wait for a state. Raises `RedError` when all processes are gone, or nothing happens for long."""
        seen: object = None
        since = counted = time.monotonic()
        while True:
            if time.monotonic() - counted > COUNT_EVERY:
                counted = time.monotonic()
                self._need_few()
            stats = await self.stats()
            self.noted("")
            if reached(stats):
                return stats
            now = (len(self.records), stats.received, stats.acked, stats.nacked, self.payments())
            if now != seen:
                seen, since = now, time.monotonic()
            if all(process.poll() is not None for process in self.processes):
                raise self.why_died()
            if time.monotonic() - since > STUCK_AFTER:
                raise self._why_stuck()
            await asyncio.sleep(LOOK_EVERY)

    def why_died(self) -> RedError:
        """Return how the process that ended last has ended."""
        for record in reversed(self.noted("troubled")):
            told: dict[str, Any] = json.loads(record.note)
            key = str(told.pop("how"))
            return RedError(key, **told)
        statuses = [status for process in self.processes if (status := process.poll()) is not None]
        return RedError("vanished", status=statuses[-1] if statuses else 0, output=self.printed()[-300:])

    def _need_few(self) -> None:
        """Raise `RedError` when the code has started too many processes."""
        count = len(self._started())
        if count > CROWD:
            raise RedError("crowd", count=count, most=CROWD)

    def _why_stuck(self) -> RedError:
        seconds = round(STUCK_AFTER)
        looping = any(_cpu_of(pid) > BUSY_AFTER for pid in self._started())
        return RedError("loops" if looping else "stuck", seconds=seconds)

    def printed(self) -> str:
        """Return what the processes have printed."""
        texts: list[str] = []
        for path in sorted(self._folder.glob("*.out")):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - SHOWN_MAX))
                texts.append(file.read(SHOWN_MAX).decode(errors="replace"))
        return "".join(texts)[-SHOWN_MAX:]


@asynccontextmanager
async def _running(folder: Path, program: Path) -> AsyncGenerator[Run]:
    """Make a run; when the block ends, all its processes are dead and its files are gone."""
    (folder / DESK).mkdir(mode=0o700, parents=True)
    broker = filao.connect(folder / "claims.db")
    try:
        await _to_its_end(broker.open())
        backoff = filao.Backoff(first=0.1, ceiling=0.2, jitter=0.0)
        await broker.declare(filao.Queue(CLAIMS, lease=30, max_attempts=3, backoff=backoff))
        async with broker.transaction() as tx:
            await tx.execute(PAYMENTS)
        with closing(sqlite3.connect(folder / "claims.db")) as business:
            run = Run(folder, program, broker, business)
            try:
                yield run
            finally:
                run.end()
    finally:
        try:
            await _to_its_end(broker.close())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """Tell a guard to end what it guards."""
    assert process.stdin is not None
    process.stdin.close()
    process.send_signal(signal.SIGCONT)  # in case the code has stopped it


def _see_ended(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a guard, and help one that cannot run because the code's processes take all the time."""
    try:
        process.wait(HOME_WITHIN)
    except subprocess.TimeoutExpired:
        kill_below(process.pid)
        process.kill()
        process.wait()


async def _to_its_end(call: Coroutine[Any, Any, None]) -> None:
    """Wait for an opening or a closing even when cancelled: its thread would go on, in a folder that is gone."""
    task = asyncio.create_task(call)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait((task,))


def _cpu_of(pid: int) -> float:
    """Return the seconds of CPU that a process has used; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the checks ------------------------------------------------------------------------------------------------------


async def _after_work(run: Run) -> Result:
    """Check with one claim that it is paid when it is acknowledged."""
    await run.send(effort=0.3)
    run.start(1)
    await run.until(lambda _: bool(run.noted("acked")) or _unpaid(run))
    if _unpaid(run):
        raise RedError("too_early")
    return Result("green", "ok_after_work")


def _unpaid(run: Run) -> bool:
    """Return whether a claim was acknowledged that was not paid."""
    return any(record.note == "unpaid" for record in run.noted("acked")) or any(
        record.note == "once" for record in run.noted("received")
    )


async def _survives(run: Run) -> Result:
    """Kill the process that works on a claim: another one must pay it."""
    await run.send()
    run.start(PROCESSES, endless=1)
    pid = await _kill_at_work(run, 1)
    stats = await run.until(lambda stats: (stats.acked > 0 and (run.paid() > 0 or _is_empty(stats))) or stats.dead > 0)
    if not run.paid():
        raise RedError("lost_by_kill" if not stats.dead else "not_paid", pid=pid)
    heir = run.noted("received")[-1]
    return Result("green", "ok_survives", {"pid": pid, "other": heir.pid, "attempt": heir.attempt})


async def _kill_at_work(run: Run, claim: int) -> int:
    """Kill the process that works on a claim, or just after that if the code takes no time; return its pid."""
    await run.until(lambda stats: bool(run.noted("halted")) or run.payments(claim) > 0 or stats.dead > 0)
    records = run.noted("halted") or [record for record in run.noted("received") if record.claim == claim]
    run.kill(records[0].who)
    return records[0].pid


def _is_empty(stats: filao.QueueStats) -> bool:
    return not (stats.ready or stats.delayed or stats.leased or stats.blocked)


async def _nacks(run: Run) -> Result:
    """Send a claim whose evaluation fails: it must be given back or given up, neither acknowledged nor suffered."""
    await run.send(policy=0)
    run.start(PROCESSES)
    stats = await run.until(lambda stats: stats.dead > 0 or stats.acked > 0)
    if stats.acked:
        raise RedError("acked_failed")
    if stats.nacked or "rejected" in await run.dead_reasons():
        return Result("green", "ok_nacks", {"attempts": stats.received})
    raise run.why_died()


async def _nothing_lost(run: Run) -> Result:
    """Send a hundred claims to three processes, and kill one on the way: all must be paid."""
    await run.send(ALL, effort=0.02)
    run.start(PROCESSES, endless=KILLED)
    pid = await _kill_at_work(run, KILLED)
    await run.until(_is_empty)
    lost = ALL - run.paid()
    if lost:
        raise RedError("lost_some", lost=lost, all=ALL)
    counts = [sum(record.who == number for record in run.noted("received")) for number in range(1, PROCESSES + 1)]
    return Result("green", "ok_nothing_lost", {"all": ALL, "pid": pid, "shares": SHARED.join(map(str, counts))})


async def _once(run: Run) -> Result:
    """Let the process die after it has paid, before the acknowledgement reaches the queue: the claim comes again."""
    await run.send()
    run.start(PROCESSES, kill_at_ack=1)
    stats = await run.until(lambda stats: _is_empty(stats) and (stats.acked > 0 or stats.dead > 0))
    if not stats.dead and run.noted("halted"):  # an acknowledgement is written down just after it
        await run.until(lambda _: bool(run.noted("acked")))
    if _unpaid(run):
        raise RedError("acked_first")
    times = run.payments(1)
    if times > 1:
        raise RedError("paid_twice", times=times)
    if not times:
        raise RedError("not_paid")
    if not run.noted("halted"):
        raise RedError("never_acked")
    return Result("green", "ok_once")


_VERIFY: dict[str, Callable[[Run], Coroutine[Any, Any, Result]]] = {
    "after_work": _after_work,
    "survives": _survives,
    "nacks": _nacks,
    "nothing_lost": _nothing_lost,
    "once": _once,
}
