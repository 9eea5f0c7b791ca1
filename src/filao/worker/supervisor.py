"""The supervisor: several worker processes, each started again when it dies, all stopped together.

A process is started, never forked, with a pipe on its stdin: when the supervisor dies, even by SIGKILL, the pipe ends
and the process stops gracefully. So it does at a signal, however often it comes, because systemd sends SIGTERM to all
processes of a service, and the supervisor passes on its own. To stop it at once, the supervisor writes into that pipe.
On another pipe it reports once a second how its worker is doing, from a thread, so that it does so even while its event
loop is blocked.
"""

import asyncio
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from filao.guarded import Log
from filao.process import start
from filao.worker.shift import Status
from filao.worker.signals import told_by_signals
from filao.worker.worker import Worker

log: Log = Log(logging.getLogger("filao.worker"))

PAUSE_FIRST = 0.1  # seconds before a process that died is started again; doubled each time
PAUSE_MAX = 30.0
STEADY_AFTER = 60.0  # seconds of life after which the next pause is the first again
REPORT_EVERY = 1.0  # seconds
REPORT_MAX = 4 * 1024 * 1024  # bytes, of a worker with some ten thousand queues
SILENT_AFTER = 15.0  # seconds without a report after which a process is unhealthy
KILLED_AFTER = 15.0  # seconds beyond a worker's grace after which a process that was told to stop is killed
LAST_WORDS_WITHIN = 1.0  # seconds for reading the pipe of a process that has ended to its end
CANNOT_START = 71  # EX_OSERR: the code for a process that could not be started
IDLE = 82  # the code of a process that ended because there was nothing to do, and that no other replaces
SHORT = 0.5  # seconds of life so short that the next start waits, even though the process ended as it should


class Report(msgspec.Struct, frozen=True):
    """What a process tells its supervisor."""

    status: Status
    grace: float
    refused: bool = False
    """Whether it can never start, because its configuration is wrong; an exit code alone could be a handler's. With
    `until_idle`, also that it could never receive.
    """


@dataclass(slots=True)
class Slot:
    """One of the processes, as it is now."""

    number: int
    process: asyncio.subprocess.Process | None = None
    report: Report | None = None
    reported_at: float = field(default_factory=time.monotonic)
    restarts: int = 0
    is_refused: bool = False
    """Whether the last process reported that it can never start."""

    def stop_at_once(self) -> None:
        """Tell the process, which was told to stop, to do so at once."""
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(b"\n")

    def state(self) -> dict[str, object]:
        """Return how it is doing, for the health check."""
        alive = self.process is not None and self.process.returncode is None
        report = self.report if alive else None
        silent = time.monotonic() - self.reported_at > SILENT_AFTER
        return {
            "pid": self.process.pid if alive and self.process is not None else None,
            "restarts": self.restarts,
            "ready": report is not None and report.status.ready,
            "healthy": report is not None and report.status.healthy and not silent,
            "running": report.status.running if report else {},
            "handled": report.status.handled if report else 0,
            "problems": ["it does not report"]
            if silent
            else report.status.problems
            if report
            else ["it has not begun"],
        }


class Supervisor:
    """Keeps `count` processes of a command running until it is told to stop."""

    def __init__(self, command: Sequence[str], count: int, *, until_idle: bool = False) -> None:
        self._command = command
        self._until_idle = until_idle
        """Whether each process ends when it has nothing to do; then one that cannot start is not waited for."""
        self._slots = [Slot(number) for number in range(1, count + 1)]
        self._stops = 0
        self._has_run = False
        """Whether one of them has ever received, so that their configuration can be right."""
        self._stopping = asyncio.Event()
        self._renewed = asyncio.Event()

    def state(self) -> dict[str, object]:
        """Return how all are doing. May be called from any thread."""
        slots = [slot.state() for slot in self._slots]
        ready, healthy = all(slot["ready"] for slot in slots), all(slot["healthy"] for slot in slots)
        return {"ready": ready, "healthy": healthy, "processes": slots}

    async def run(self) -> int:
        """Run them until they are told to stop, by signals as a worker is, and return the exit code."""
        with told_by_signals(self._stop):
            return max(await asyncio.gather(*(self._keep(slot) for slot in self._slots)))

    def renew(self) -> None:
        """Stop all processes gracefully, so that others replace them; one that waits to be started starts at once."""
        self._renewed.set()
        self._renewed = asyncio.Event()
        for slot in self._slots:
            _signal(slot.process, signal.SIGTERM)

    def _stop(self) -> None:
        """Pass a signal on: the first stops them gracefully, the second at once, the third kills them."""
        self._stops += 1
        self._stopping.set()
        for slot in self._slots:
            if self._stops == 2:
                slot.stop_at_once()
            else:
                _signal(slot.process, signal.SIGTERM if self._stops == 1 else signal.SIGKILL)
            if self._stops == 1:
                grace = slot.report.grace if slot.report else 0.0
                asyncio.get_running_loop().call_later(grace + KILLED_AFTER, _signal, slot.process, signal.SIGKILL)

    async def _keep(self, slot: Slot) -> int:
        """Start a process again and again, and return the exit code of the last.

        If none of them can ever start, all stop. Once one has run, what prevents a start is waited out, unless they run
        only until they have nothing to do.
        """
        pause = PAUSE_FIRST
        while True:
            began, renewed = time.monotonic(), self._renewed
            code = await self._run_once(slot)
            slot.is_refused = slot.report is not None and slot.report.refused
            if code == IDLE:
                return 0
            if self._stopping.is_set() or (self._until_idle and slot.is_refused):
                return code if slot.is_refused else 0
            if not self._has_run and all(one.is_refused for one in self._slots):
                self._stop()
                return code
            lived = time.monotonic() - began
            if code == 0 and (lived > SHORT or renewed.is_set()):
                log.info("worker process %d ended as it should; starting the next", slot.number)
                continue
            if lived > STEADY_AFTER:
                pause = PAUSE_FIRST
            slot.restarts += 1
            spread = pause * random.uniform(0.5, 1.5)  # so that not all come back at one moment
            log.error("worker process %d %s; starting it again in %.1f s", slot.number, _ended(code), spread)
            if await self._pause(spread):
                return code if slot.is_refused else 0
            pause = min(2 * pause, PAUSE_MAX)

    async def _pause(self, seconds: float) -> bool:
        """Wait before the next start, until all are renewed or stopped; return whether they are stopped."""
        ends = [asyncio.create_task(event.wait()) for event in (self._stopping, self._renewed)]
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return self._stopping.is_set()

    async def _run_once(self, slot: Slot) -> int:
        try:
            return await self._start(slot)
        except (OSError, RuntimeError):  # no descriptors, no memory, no processes left; no thread, before Python 3.12
            log.exception("worker process %d cannot be started", slot.number)
            return CANNOT_START

    async def _start(self, slot: Slot) -> int:
        reading, writing = os.pipe()
        try:
            slot.process = await asyncio.create_subprocess_exec(
                *self._command,
                *("--report-to", str(writing), "--slot", str(slot.number)),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=[writing],
                start_new_session=True,  # a Ctrl-C reaches only the supervisor, which passes it on
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        slot.report, slot.reported_at = None, time.monotonic()
        reports = asyncio.create_task(self._read_reports(slot, reading))
        if self._stopping.is_set():
            _signal(slot.process, signal.SIGTERM)
        try:
            return await slot.process.wait()
        finally:
            await asyncio.wait([reports], timeout=LAST_WORDS_WITHIN)  # its last report may be on its way
            reports.cancel()
            await asyncio.wait([reports])

    async def _read_reports(self, slot: Slot, reading: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=REPORT_MAX)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
        )
        try:
            async for line in reader:
                with suppress(msgspec.DecodeError):  # something else was written there, by a handler, say
                    slot.report, slot.reported_at = msgspec.json.decode(line, type=Report), time.monotonic()
                    self._has_run |= slot.report.status.ready
        finally:
            transport.close()


class Orders:
    """What a supervised process is told: to stop gracefully, any number of times, or at once."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        """Is called once to stop gracefully, and a second time to stop at once."""
        self._is_told = False

    def stop(self) -> None:
        """Stop gracefully."""
        if not self._is_told:
            self._is_told = True
            self._stop()

    def stop_at_once(self) -> None:
        """Stop at once."""
        self.stop()
        self._stop()


def report(worker: Worker, grace: float, pipe: int, orders: Orders) -> Callable[[], None]:
    """In a supervised process: report from a thread, and stop when the supervisor says so or is gone.

    Return a function that tells the supervisor that this worker can never start. Raises `EngineUnavailable` when no
    thread can be started.
    """
    stream = os.fdopen(pipe, "wb", buffering=0)
    loop = asyncio.get_running_loop()
    start(threading.Thread(target=_report, args=(worker, grace, stream), name="filao reports", daemon=True))
    start(threading.Thread(target=_await_end, args=(loop, orders), name="filao supervisor's end", daemon=True))

    def refuse() -> None:
        with suppress(OSError):
            stream.write(msgspec.json.encode(Report(worker.status(), grace, refused=True)) + b"\n")

    return refuse


def _report(worker: Worker, grace: float, stream: BinaryIO) -> None:
    encode = msgspec.json.encode
    with suppress(OSError):  # the supervisor is gone
        while True:
            stream.write(encode(Report(worker.status(), grace)) + b"\n")
            time.sleep(REPORT_EVERY)


def _await_end(loop: asyncio.AbstractEventLoop, orders: Orders) -> None:
    with suppress(RuntimeError):  # the loop is closed
        while os.read(0, 1024):  # past Python's buffer, whose lock a thread must not hold when the process ends
            loop.call_soon_threadsafe(orders.stop_at_once)
        loop.call_soon_threadsafe(orders.stop)


def _signal(process: asyncio.subprocess.Process | None, number: int) -> None:
    if process is not None and process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
