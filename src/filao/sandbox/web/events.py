"""What a page may ask for: one function for each event. Every argument is brought within its bounds before it is used.

An event that makes no sense changes nothing and does not close the page's socket.
"""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from filao.engine import State
from filao.sandbox.claims import BadClaimsError, from_text
from filao.sandbox.exercise import CODE_MAX
from filao.sandbox.orders import CONSUMERS_MAX, GUARANTEES, NUMBER_MAX
from filao.sandbox.room import SUBMITTED_MAX, RoomError
from filao.sandbox.steps import STEPS
from filao.sandbox.visits import Visit

SLOW = 3.0  # how many times as long as others a slow consumer needs
BURST_MAX = 200  # claims at one press of a button
FILE_MAX = 500_000  # bytes of a CSV file
BOUNDS: Mapping[str, tuple[float, float]] = {
    "lease": (1, 60),
    "max_attempts": (1, 10),
    "backoff": (0, 30),
    "work": (0.05, 60),
    "arrivals": (0, 20),
    "failing": (0, 0.9),
}

Choice = TypeVar("Choice", bound=str)


class Asked:
    """The arguments of one event, each read within bounds."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def number(self, name: str, least: float, most: float) -> float:
        """Return a number within bounds; the least for anything that is not a number."""
        value = self._given.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return least
        return min(max(float(max(min(value, NUMBER_MAX), -NUMBER_MAX)), least), most)

    def whole(self, name: str, least: int, most: int) -> int:
        """Return a whole number within bounds."""
        return int(self.number(name, least, most))

    def text(self, name: str, most: int) -> str:
        """Return a text, cut to so many characters; an empty one for anything else."""
        value = self._given.get(name)
        return value[:most] if isinstance(value, str) else ""

    def choice(self, name: str, choices: Sequence[Choice]) -> Choice:
        """Return one of the choices; the first for anything else."""
        value = self._given.get(name)
        return next((choice for choice in choices if choice == value), choices[0])

    def flag(self, name: str) -> bool:
        """Return whether a flag is set."""
        return self._given.get(name) is True

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return a JSON object; an empty one for anything else."""
        value = self._given.get(name)
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}

    def texts(self, name: str) -> set[str]:
        """Return a list of texts; an empty one for anything else."""
        value = self._given.get(name)
        found = cast("list[object]", value)[:100] if isinstance(value, list) else []
        return {one for one in found if isinstance(one, str)}


async def handle(visit: Visit, asked: Mapping[str, Any], *, may_run_code: bool) -> None:
    """Do what a page asks for. Raises `RoomError` when it cannot be done."""
    name = asked.get("do")
    verb = VERBS.get(name) if isinstance(name, str) else None
    if name in ("check", "stop") and not may_run_code:
        raise RoomError("no_code")
    if verb is not None:
        await verb(visit, Asked(asked))


async def _go(visit: Visit, asked: Asked) -> None:
    visit.go(asked.whole("step", 0, len(STEPS) - 1))


async def _restore(visit: Visit, asked: Asked) -> None:
    chosen = {key: int(place) for key, place in asked.mapping("chosen").items() if place in (0, 1, 2)}
    visit.restore(asked.texts("done"), chosen, asked.whole("current", 0, len(STEPS) - 1))


async def _predict(visit: Visit, asked: Asked) -> None:
    visit.progress.chosen[visit.step.key] = asked.whole("place", 0, 2)


async def _act(visit: Visit, asked: Asked) -> None:
    await visit.act(asked.text("key", 40))


async def _submit(visit: Visit, asked: Asked) -> None:
    room = visit.room
    room.need_queue()
    if asked.flag("poison"):
        await room.submit([room.customers.case(policy=0)])
    else:
        await room.submit(room.customers.cases(asked.whole("count", 1, BURST_MAX)))


async def _submit_file(visit: Visit, asked: Asked) -> None:
    room = visit.room
    room.need_queue()
    text = asked.text("text", FILE_MAX + 1)
    if len(text) > FILE_MAX:
        raise RoomError("large", size=round(len(text) / 1000))
    try:
        read = from_text(asked.text("name", 100), text, SUBMITTED_MAX + 1)
    except BadClaimsError as error:
        raise RoomError(f"csv_{error.key}", **error.values) from error
    await room.submit([room.customers.case(policy=one.policy, amount=one.amount) for one in read])


async def _add(visit: Visit, _: Asked) -> None:
    visit.room.add_consumer()


async def _remove(visit: Visit, _: Asked) -> None:
    visit.room.remove_consumer()


async def _kill(visit: Visit, asked: Asked) -> None:
    visit.room.kill(asked.whole("consumer", 0, NUMBER_MAX))


async def _pause(visit: Visit, asked: Asked) -> None:
    await visit.room.pause(asked.whole("consumer", 0, NUMBER_MAX))


async def _resume(visit: Visit, asked: Asked) -> None:
    visit.room.go_on(asked.whole("consumer", 0, NUMBER_MAX))


async def _slow(visit: Visit, asked: Asked) -> None:
    lane = visit.room.lane(asked.whole("consumer", 0, NUMBER_MAX))
    visit.room.set_consumer(lane.number, slow=1.0 if lane.slow > 1 else SLOW)


async def _fail(visit: Visit, asked: Asked) -> None:
    lane = visit.room.lane(asked.whole("consumer", 0, NUMBER_MAX))
    visit.room.set_consumer(lane.number, fails=not lane.fails)


async def _set(visit: Visit, asked: Asked) -> None:
    """Set a rule or a slider, and measure the load from now on."""
    room, rule = visit.room, asked.text("rule", 40)
    if rule == "consumers":
        await room.create()
        await room.have_consumers(asked.whole("value", 0, CONSUMERS_MAX))
    elif rule == "guarantee":
        await room.change(guarantee=asked.choice("value", GUARANTEES))
    elif rule in ("grouped", "documents"):
        room.need_queue()
        await room.change(**{rule: asked.flag("value")})
    elif rule in BOUNDS:
        if rule in ("arrivals", "work", "failing"):
            await room.create()
        value = asked.number("value", *BOUNDS[rule])
        await room.change(**{rule: int(value) if rule == "max_attempts" else value})
    visit.measure_anew()


async def _freeze(visit: Visit, _: Asked) -> None:
    await (visit.room.thaw() if visit.room.is_frozen else visit.room.freeze())


async def _purge(visit: Visit, asked: Asked) -> None:
    await visit.room.purge(State.DEAD if asked.flag("dead") else None)


async def _redrive(visit: Visit, asked: Asked) -> None:
    message = asked.text("message", 300)
    if asked.flag("mended"):
        await visit.room.mend(message, asked.whole("policy", 0, NUMBER_MAX))
    else:
        await visit.room.redrive([message] if message else None)


async def _check(visit: Visit, asked: Asked) -> None:
    if visit.step.key == "implement":
        visit.begin()
    await visit.room.exercise.start(asked.text("code", CODE_MAX + 1))


async def _stop(visit: Visit, _: Asked) -> None:
    await visit.room.exercise.cancel()


VERBS: Mapping[str, Callable[[Visit, Asked], Awaitable[None]]] = {
    "go": _go,
    "restore": _restore,
    "predict": _predict,
    "act": _act,
    "submit": _submit,
    "submit_file": _submit_file,
    "add": _add,
    "remove": _remove,
    "kill": _kill,
    "pause": _pause,
    "resume": _resume,
    "slow": _slow,
    "fail": _fail,
    "set": _set,
    "freeze": _freeze,
    "purge": _purge,
    "redrive": _redrive,
    "check": _check,
    "stop": _stop,
}
