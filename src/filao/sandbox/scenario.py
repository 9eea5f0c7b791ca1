"""The course of EVT-02: processes are started, watched, one is killed half-way, and in the end the ledger is drawn up.

What is shown on the way is up to a `Watcher`; what is known comes from the journals and from the queue's counters.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

import filao
from filao.sandbox import journal
from filao.sandbox.board import Board, KillWhen
from filao.sandbox.claims import Claim
from filao.sandbox.crew import Crew
from filao.sandbox.journal import KILLS, PORTAL, Journal, Record, Tail, journal_of
from filao.sandbox.ledger import Ledger, draw_up
from filao.sandbox.orders import QUEUE, PortalOrders, WorkerOrders, pace, trouble
from filao.sandbox.texts import Language

DEADLINE = 55.0  # seconds after which the demo gives up
FRAME = 0.1  # seconds between two looks
HUNT = 0.01  # seconds between two looks for somebody to kill

WORKER_MODULE, PORTAL_MODULE = "filao.sandbox.claims_worker", "filao.sandbox.portal"


class TooSlowError(Exception):
    """The demo did not end in time."""

    def __init__(self, handled: int) -> None:
        super().__init__(handled)
        self.handled = handled


class Watcher(Protocol):
    """Somebody who looks at the board ten times in a second."""

    def show(self, board: Board) -> None:
        """Draw it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is played."""

    claims: Sequence[Claim]
    seed: int
    workers: int
    seconds: float
    language: Language
    kill_when: KillWhen | None
    """In which moment of its work a worker is killed; None: none is."""
    restart: bool
    """Whether a new worker takes the place of the killed one."""


class Play:
    """One performance, on one file."""

    def __init__(self, scenario: Scenario, file: Path, folder: Path, watcher: Watcher) -> None:
        self._scenario = scenario
        self._file = file
        self._folder = folder
        self._watcher = watcher
        self._pace = pace(len(scenario.claims), workers=scenario.workers, seconds=scenario.seconds)
        self._tails: dict[int, Tail] = {}
        self._kill_when: KillWhen | None = scenario.kill_when
        self.board = Board({claim.number: claim for claim in scenario.claims}, began=time.monotonic())

    async def perform(self) -> None:
        """Play it to the end: when this returns, the queue is empty and every process has ended well.

        Raises `CrewError` when one failed, `TooSlowError` after `DEADLINE`; also then no process is left.
        """
        try:
            async with asyncio.timeout(DEADLINE):
                await self._perform()
        except TimeoutError as error:
            raise TooSlowError(self.board.handled) from error

    async def _perform(self) -> None:
        async with filao.connect(self._file) as broker:
            await broker.declare(QUEUE)
            with Crew(self._folder) as crew:
                self._start(crew)
                while not await self._is_over(broker, crew):
                    await self._pause(crew)
            self._listen()
            self.board.measure(time.monotonic(), await broker.stats(QUEUE))
            self._watcher.show(self.board)

    def _start(self, crew: Crew) -> None:
        claims = self._folder / "claims.json"
        claims.write_bytes(msgspec.json.encode(self._scenario.claims))
        for number in range(1, self._scenario.workers + 1):
            self._start_worker(crew, number)
        orders = PortalOrders(str(self._file), str(self._folder), str(claims), self._pace.sending)
        self._expect(PORTAL, crew.start(PORTAL, PORTAL_MODULE, orders))

    def _start_worker(self, crew: Crew, number: int) -> None:
        silent, unknown = trouble(self._scenario.seed, self._scenario.claims)
        orders = WorkerOrders(
            file=str(self._file),
            journals=str(self._folder),
            number=number,
            language=self._scenario.language,
            desks=self._pace.desks,
            work=self._pace.work,
            silent=silent,
            unknown=unknown,
        )
        self._expect(number, crew.start(number, WORKER_MODULE, orders))

    def _expect(self, number: int, pid: int) -> None:
        self._tails[number] = Tail(journal_of(self._folder, number))
        self.board.expect(number, pid)

    async def _is_over(self, broker: filao.Broker, crew: Crew) -> bool:
        """Look at everything, show it, and return whether all has been sent and nothing is left to do."""
        crew.check(range(1, len(self._tails)))
        if not self.board.portal_ended and crew.has_ended_well(PORTAL):
            self._listen()
            self.board.portal_left(time.monotonic())
        stats = await broker.stats(QUEUE)
        self._listen()
        self.board.measure(time.monotonic(), stats)
        self._watcher.show(self.board)
        return self.board.portal_ended and not stats.ready + stats.delayed + stats.blocked + stats.leased

    def _listen(self) -> None:
        news = [record for tail in self._tails.values() for record in tail.read()]
        for record in sorted(news, key=lambda record: record.at):
            self.board.feed(record)

    # --- the kill ----------------------------------------------------------------------------------------------------

    async def _pause(self, crew: Crew) -> None:
        """Let a frame's time pass; when it is time to kill, use it to look for somebody."""
        until = time.monotonic() + FRAME
        while (when := self._kill_when) is not None and self.board.is_half_way() and time.monotonic() < until:
            self._hunt(crew, when)
            await asyncio.sleep(HUNT)
            self._listen()
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    def _hunt(self, crew: Crew, when: KillWhen) -> None:
        """Kill a worker that holds a claim in the wanted moment, if there is one."""
        for number in self.board.holders(when):

            def holds(number: int = number) -> bool:
                self._listen()
                return number in self.board.holders(when)

            at = crew.kill_if(number, holds)
            if at is not None:
                self._kill_when = None
                self._write_down(number, at)
                if self._scenario.restart:
                    self._start_worker(crew, len(self.board.workers) + 1)
                return

    def _write_down(self, number: int, at: float) -> None:
        record = Record(at, number, "killed", pid=self.board.workers[number].pid)
        dead = Journal(self._folder / KILLS, number)
        dead.write_record(record)
        dead.close()
        self.board.feed(record)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def ledger(self) -> Ledger:
        """Draw up the ledger from the journals, read afresh."""
        async with filao.connect(self._file) as broker:
            dead = await broker.dead_letters(QUEUE, limit=10_000)
            stats = await broker.stats(QUEUE)
        records = journal.read_all(self._folder)
        return draw_up(records, dead, stats, planned=len(self._scenario.claims), desks=self._pace.desks)
