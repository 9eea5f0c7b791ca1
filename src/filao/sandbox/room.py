"""A room: one learner's insurer, with its file, its processes, and what is known of them.

Each verb is something that the learner does; `look` finds out what has come of it. When the room closes, its processes
end and its folder goes. Nothing here knows how it is drawn.
"""

import asyncio
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

import msgspec
from msgspec import UNSET

import filao
from filao.engine import State, StoredMessage
from filao.engines.sqlite.turnstile import is_passable
from filao.sandbox.crew import Crew, is_there
from filao.sandbox.customers import Case, Customers
from filao.sandbox.effects import Effects
from filao.sandbox.exercise import Exercise
from filao.sandbox.journal import PORTAL, PRINTER, Tail, journal_of
from filao.sandbox.lanes import Lane, Lanes
from filao.sandbox.news import News
from filao.sandbox.orders import (
    CLAIMS,
    CONSUMERS_MAX,
    DOCUMENTS,
    PAYMENTS,
    Claim,
    Duty,
    Guarantee,
    Halt,
    Moment,
    Post,
    Setting,
    Submission,
    number_in,
)
from filao.sandbox.rows import Rows
from filao.sandbox.view import SHOWN, View, Viewer

FILE = "claims.db"
SUBMITTED_MAX = 5_000  # claims in one go
CLAIMS_MAX = 20_000  # in one room: what is known of each is kept in memory
TOLD_AT_ONCE = 200  # claims in one line to the portal, so that it fits into a pipe
STOP_TRIES, STOP_PAUSE, PASSES_WITHIN = 40, 0.02, 0.05  # to stop a consumer outside its turn to write
THAWED_WITHIN = 2.0  # seconds in which consumers that were frozen extend their leases
WORK, BACKOFF = 2.0, 1.0  # seconds, at normal speed: for a claim, and before its second attempt
READY_WITHIN = 30.0  # seconds that a scene waits for the consumers that it starts


class RoomError(Exception):
    """What the learner asked for cannot be done; `key` is that of the page's text that says why."""

    def __init__(self, key: str, **values: str | int) -> None:
        super().__init__(key)
        self.key = key
        self.values = values


class Room:
    """One learner's insurer; `async with` opens and closes it."""

    def __init__(self, folder: Path, speed: float = 1.0) -> None:
        self.folder = folder
        self.speed: float = speed
        """How many times as fast as normally the lesson goes: the work, and the wait after a failure."""
        self.file: Path = folder / FILE
        self.setting: Setting = Setting(work=WORK / speed, backoff=BACKOFF / speed)
        self.customers: Customers = Customers()
        self._rows = Rows(self.file)
        self.lanes: Lanes = Lanes(self._rows.row)
        self.effects: Effects = Effects()
        self.news: News = News(self.customers, self.lanes, self.effects)
        self.portal_pid: int = 0
        self.trials: dict[tuple[Guarantee, Moment], int] = {}
        """The claims whose consumers were killed, see `trials.py`."""
        self.policies: dict[int, int] = {}
        """By claim, for those that were submitted here."""
        self.exercise: Exercise = Exercise(folder / "exercise")
        self.is_frozen: bool = False
        self._broker = filao.connect(self.file)
        self.viewer: Viewer = Viewer(folder, self._broker, self.lanes, self.effects)
        self._crew = Crew(folder)
        self._tails: dict[int, Tail] = {}
        self._consumers = 0
        self._acting = asyncio.Lock()
        self._frozen: list[int] = []
        self._halt: Halt | None = None

    async def __aenter__(self) -> Self:
        await self._broker.open()
        async with self._broker.transaction() as tx:
            await tx.execute(PAYMENTS)
        self.viewer.open(self.file)
        return self

    async def __aexit__(self, *error: object) -> None:
        for lane in self.lanes.living():
            self._crew.go_on(lane.number)
        await self.exercise.stop()
        await asyncio.to_thread(self._crew.end_all)
        self.viewer.close()
        self._rows.close()
        with suppress(filao.FilaoError):
            await self._broker.close()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    # --- what the learner does: the queue ----------------------------------------------------------------------------

    @property
    def has_queue(self) -> bool:
        """Whether the learner has created the queue."""
        return self.portal_pid != 0

    async def create(self) -> None:
        """Create the queue, and open the portal that sends to it."""
        await self._broker.declare(self.setting.queue())
        if not self.has_queue:
            self.portal_pid = self._start(PORTAL, "portal")

    async def change(self, **changes: Any) -> None:
        """Change the rules of the queue, or how the insurer works."""
        self.setting = msgspec.structs.replace(self.setting, **changes)
        if self.has_queue:
            await self._broker.declare(self.setting.queue())
        if self.setting.documents and PRINTER not in self._tails:
            await self._broker.declare(filao.Queue(DOCUMENTS))
            self._start(PRINTER, "printer")
        self._tell_all()

    async def submit(self, cases: Sequence[Case]) -> list[int]:
        """Let customers hand in claims at the portal; return their numbers.

        Raises `RoomError` before there is a queue, and for too many; a claim that was refused used up no number.
        """
        self.need_queue()
        if len(cases) > SUBMITTED_MAX or len(self.effects.fates) + len(cases) > CLAIMS_MAX:
            raise RoomError("too_many", count=len(cases), most=SUBMITTED_MAX)
        claims = [Claim(self.customers.next_number(), *case) for case in cases]
        self.policies.update((claim.claim_id, claim.policy) for claim in claims)
        for start in range(0, len(claims), TOLD_AT_ONCE):
            part = Submission(tuple(claims[start : start + TOLD_AT_ONCE]), grouped=self.setting.grouped)
            if not await asyncio.to_thread(self._crew.tell, PORTAL, part):
                for claim in claims[start:]:
                    self.customers.take_back(claim.claim_id)
                raise RoomError("portal_died", count=len(claims) - start)
        return [claim.claim_id for claim in claims]

    async def arrive(self) -> None:
        """Let the claims arrive that come by themselves."""
        is_open = self.has_queue and not self.is_frozen
        due = self.customers.due(self.setting.arrivals if is_open else 0.0, time.monotonic())
        if due and len(self.effects.fates) + due <= CLAIMS_MAX:
            await self.submit(self.customers.cases(due))

    async def redrive(self, messages: Sequence[str] | None = None, *, body: Any = UNSET) -> int:
        """Send dead letters back; with a `body`, the one that is named is mended."""
        self.need_queue()
        return await self._broker.redrive(CLAIMS, ids=messages, body=body)

    async def mend(self, message: str, policy: int) -> None:
        """Correct the policy of a dead letter, and send it back. Raises `RoomError` when it is gone."""
        letter = next((letter for letter in self.viewer.view.dead if letter.id == message), None)
        if letter is None:
            raise RoomError("no_letter")
        stored: Any = letter.body
        body = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
        self.policies[number_of(letter)] = policy
        await self.redrive([message], body=body | {"policy": policy})

    async def purge(self, state: State | None = None) -> int:
        """Delete what waits, or all in one state."""
        self.need_queue()
        states = (State.READY, State.DELAYED, State.BLOCKED) if state is None else (state,)
        self.effects.removed(await self.viewer.ids(states))
        return await self._broker.purge(CLAIMS, state=state)

    async def clear(self) -> None:
        """Empty the scene for another step: delete what waits and what is dead, and let nothing arrive by itself."""
        self._need_motion()
        await self.create()
        await self.change(arrivals=0.0, failing=0.0)
        await self.purge()
        await self.purge(State.DEAD)

    def need_queue(self) -> None:
        """Raise `RoomError` unless the queue is created."""
        if not self.has_queue:
            raise RoomError("no_queue")

    def _need_motion(self) -> None:
        if self.is_frozen:
            raise RoomError("frozen")

    # --- what the learner does: the consumers ------------------------------------------------------------------------

    def add_consumer(self) -> Lane:
        """Start a consumer."""
        self.need_queue()
        self._need_motion()
        if len(self.lanes.living()) >= CONSUMERS_MAX:
            raise RoomError("enough_consumers", most=CONSUMERS_MAX)
        self._consumers += 1
        number = self._consumers
        lane = self.lanes.expect(number, 0)
        lane.pid = self._start(number, "worker")
        self._tell(lane)
        return lane

    def remove_consumer(self, number: int | None = None) -> None:
        """Send a consumer home, the youngest if none is named; what it has begun is finished or given back."""
        living = [lane for lane in self.lanes.living() if number in (None, lane.number)]
        if living:
            lane = living[-1]
            self._crew.go_on(lane.number)
            self._crew.dismiss(lane.number)
            self.lanes.leaves(lane.number)

    async def have_consumers(self, count: int) -> None:
        """Start consumers or send some home until there are so many, and all can work."""
        self._need_motion()
        for lane in self.lanes.living():
            if lane.state == "paused":
                self.go_on(lane.number)
            self.set_consumer(lane.number, slow=1.0, fails=False)
        while len(self.lanes.living()) > count:
            self.remove_consumer()
        while len(self.lanes.living()) < count:
            self.add_consumer()

    async def until_ready(self) -> None:
        """Wait until all consumers have started, so that those that start quickly do not do the work of all."""
        until = time.monotonic() + READY_WITHIN
        while any(lane.state == "starting" for lane in self.lanes.living()) and time.monotonic() < until:
            self._listen()
            await asyncio.sleep(STOP_PAUSE)

    def set_consumer(self, number: int, *, slow: float | None = None, fails: bool | None = None) -> None:
        """Make a consumer slow, or make it fail, or mend it."""
        lane = self.lane(number)
        lane.slow = lane.slow if slow is None else slow
        lane.fails = lane.fails if fails is None else fails
        self._tell(lane)

    def kill(self, number: int) -> None:
        """Kill a consumer with SIGKILL, whatever it is doing."""
        self.lane(number)
        at = self._crew.kill(number)
        self._listen()  # to what it wrote down before
        self.lanes.left(number, at, "killed")

    def halt(self, halt: Halt | None) -> None:
        """Let consumers stand still at a moment of a claim, or nowhere."""
        self._halt = halt
        self._tell_all()

    def halted(self, claim: int) -> Lane | None:
        """Return the consumer that stands still at a claim."""
        self._listen()
        lanes = (lane for lane in self.lanes.living() if lane.holds is not None and lane.holds.halted)
        return next((lane for lane in lanes if lane.holds is not None and lane.holds.claim == claim), None)

    async def pause(self, number: int) -> None:
        """Let a consumer stand still (SIGSTOP): its process is there, but does nothing, as when a machine sleeps.

        Not in its turn to write to the file, where it would hold up everybody. Raises `RoomError` when it cannot be
        met outside it.
        """
        for _ in range(STOP_TRIES):
            if self._crew.has_ended(self.lane(number).number):
                raise RoomError("no_consumer", consumer=number)
            if self._crew.stop_if(number, self._others_can_write):
                self._listen()
                self.lanes.stood_still(number, time.monotonic())
                return
            await asyncio.sleep(STOP_PAUSE)
        raise RoomError("too_busy", consumer=number)

    def _others_can_write(self) -> bool:
        return is_passable(self.file.with_name(f"{FILE}-filao"), PASSES_WITHIN)

    def go_on(self, number: int) -> None:
        """Let a consumer that stands still go on (SIGCONT)."""
        lane = self.lane(number)
        self.lanes.went_on(number, time.monotonic())
        self._crew.go_on(number)
        self._tell(lane)

    async def freeze(self) -> None:
        """Stop the world: nothing is delivered, and all consumers stand still; or nobody does, when one cannot."""
        self.need_queue()
        async with self._acting:
            await self._broker.pause(CLAIMS)
            self.is_frozen = True
            try:
                for lane in [lane for lane in self.lanes.able() if lane.state != "starting"]:
                    await self.pause(lane.number)
                    self._frozen.append(lane.number)
            except RoomError:
                await self._go_on()
                raise

    async def thaw(self) -> None:
        """Let the world go on: first the consumers, who extend the leases that they hold, and then the queue."""
        async with self._acting:
            await self._go_on()

    async def _go_on(self) -> None:
        for number in self._frozen:
            if self.lanes.by_number[number].state == "paused":
                self.go_on(number)
        await self._until_extended(self._frozen)
        await self._broker.resume(CLAIMS)
        self._frozen = []
        self.is_frozen = False

    async def _until_extended(self, numbers: Sequence[int]) -> None:
        names = {f"{socket.gethostname()}:{self.lanes.by_number[number].pid}" for number in numbers}
        until = time.monotonic() + THAWED_WITHIN
        while time.monotonic() < until:
            leased = await self._broker.peek(CLAIMS, state=State.LEASED, limit=SHOWN)
            if all(one.at.timestamp() > time.time() for one in leased if one.consumer in names):
                return
            await asyncio.sleep(STOP_PAUSE)

    def lane(self, number: int) -> Lane:
        """Return a consumer of ours that lives. Raises `RoomError`."""
        lane = next((lane for lane in self.lanes.living() if lane.number == number), None)
        if lane is None:
            raise RoomError("no_consumer", consumer=number)
        return lane

    def _start(self, number: int, module: str) -> int:
        self._tails[number] = Tail(journal_of(self.folder, number))
        post = Post(str(self.file), str(self.folder), number, self.speed)
        return self._crew.start(number, f"filao.sandbox.{module}", post)

    def _tell_all(self) -> None:
        for lane in self.lanes.living():
            self._tell(lane)

    def _tell(self, lane: Lane) -> None:
        """Give a consumer its orders; one that stands still gets them when it goes on."""
        if lane.state != "paused":
            setting = self.setting
            rules = (setting.guarantee, setting.lease, setting.work * lane.slow, lane.fails, setting.failing)
            self._crew.tell(lane.number, Duty(*rules, setting.documents, self._halt))

    # --- what has come of it -----------------------------------------------------------------------------------------

    async def look(self) -> View:
        """Find out how things stand."""
        now = time.monotonic()
        self._listen()
        self._check_processes(now)
        return await self.viewer.look(now)

    @property
    def view(self) -> View:
        """What the last look found."""
        return self.viewer.view

    def _listen(self) -> None:
        self.news.read(self._tails.values())

    def _check_processes(self, now: float) -> None:
        """Find those that ended, and whether they were told to."""
        for lane in (*self.lanes.living(), *self.lanes.leaving()):
            if self._crew.has_ended(lane.number):
                words = self._crew.failure(lane.number)
                self._listen()  # to what it wrote down before
                self.lanes.left(lane.number, now, "crashed" if words else "gone", words)
        for lane in self.lanes.guests():
            if not is_there(lane.pid):
                self.lanes.left(lane.number, now, "gone")
        for number, module in ((PORTAL, "portal"), (PRINTER, "printer")):
            if number in self._tails and self._crew.has_ended(number):
                self.lanes.tell(now, f"{module}_died")
                tail, pid = self._tails[number], self._start(number, module)
                self._tails[number] = tail
                self.portal_pid = pid if number == PORTAL else self.portal_pid


def number_of(message: StoredMessage) -> int:
    """Return the number of the claim in a message."""
    return number_in(message.body, "claim_id")
