"""What an operator can do on a page: it is read from a form, checked, and carried out as a job.

Each act has a command that does the same, which the page shows that asks for a confirmation.
"""

import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from filao.broker import Broker
from filao.checks import check_name
from filao.codec import JSON, codec_for
from filao.dashboard.jobs import RATE_MAX, Job, in_slices
from filao.dashboard.triage import CHOSEN_MAX, LOOKED_AT_MAX, dead_letters
from filao.engine import QueueStats, State
from filao.errors import ConfigurationError, FilaoError, MessageError
from filao.overview import Deed, Overview, error_kind
from filao.queue import Queue

_OF_LETTERS: tuple[set[str], ...] = (set(), {"id"}, {"reason", "error"})
WHATS: dict[str, tuple[set[str], ...]] = {
    "redrive": _OF_LETTERS,
    "discard": _OF_LETTERS,
    "edit": ({"id"},),
    "cancel": ({"id"},),
    "purge": (set(),),
    "pause": (set(), {"group"}),
    "resume": (set(), {"group"}),
}
"""What can be done, and the sets of fields that may choose a part of the queue; the log can describe no others."""
ABOUT_MAX = 400  # characters of what the log says that a deed was about
FIELD_MAX = 2_000  # characters of one field of an act: as many as a page has of an error, whose kind is the longest


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody wants to do."""

    what: str
    queue: str
    id: str | None = None
    """The id of the one message that it is about."""
    reason: str | None = None
    """With `error`, the kind of dead letters that it is about."""
    error: str | None = None
    group: str | None = None
    """The group that should stop or go on."""

    def packed(self) -> str:
        """Return it as the value of a button."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return urlencode({name: value for name, value in fields.items() if value is not None})

    @property
    def about(self) -> str:
        """Which part of the queue, for the log."""
        if self.id is not None:
            said = f"id {self.id}"
        elif self.group is not None:
            said = f"group {self.group}"
        else:
            said = "" if self.reason is None else f"{self.reason}: {self.error or ''}"
        return said[:ABOUT_MAX]

    def twin(self) -> str:
        """Return the command that does the same, for a shell where FILAO_URL is set."""
        what, names, options = self.what, [self.queue], list[str]()
        if what == "edit":
            what, options = "redrive", ["--body", "JSON"]
        elif what == "discard" and self.id is None and self.reason is None:
            what, options = "purge", ["--state", "dead"]
        if what == "cancel" and self.id is not None:
            names.append(self.id)
        elif self.id is not None:
            options += ["--id", self.id]
        if self.reason is not None:
            options += ["--reason", self.reason, "--kind", self.error or ""]
        if self.group is not None:
            options += ["--group", self.group]
        looks_like_options = any(name.startswith("-") for name in names)
        given = [*options, "--", *names] if looks_like_options else [*names, *options]
        return shlex.join(["filao", what, *given])


def unpacked(text: str) -> Act | None:
    """Return the act in a button's value; None for a value that no button of ours has."""
    try:
        fields = storable(dict(parse_qsl(text, keep_blank_values=True, max_num_fields=10)))
        act = Act(**fields)
        check_name(act.queue)
        about = fields.keys() - {"what", "queue"}
    except (TypeError, ValueError, FilaoError):
        return None
    is_ours = about in WHATS.get(act.what, ()) and all(len(value) <= FIELD_MAX for value in fields.values())
    return act if is_ours else None


def storable(query: Mapping[str, str]) -> dict[str, str]:
    """Return fields with a symbol in place of NUL, which no name, id or key contains and SQL refuses."""
    return {name: value.replace("\0", "\N{SYMBOL FOR NULL}") for name, value in query.items()}


def rate_of(text: str) -> float | None:
    """Return the rate of a form in messages per second; None: as fast as possible. Raises `ConfigurationError`."""
    if not text.strip():
        return None
    try:
        rate = float(text.strip().replace(",", "."))
    except ValueError:
        rate = -1.0
    if not 0.01 <= rate <= RATE_MAX:
        raise ConfigurationError(f"rate is {text.strip()[:20]!r}; it must be a number from 0.01 to {RATE_MAX:,.0f}")
    return rate


def wanted(act: Act, queue: QueueStats | None, kind: int) -> int:
    """Return how many messages an act is about; `kind` is how many dead letters of its kind are known."""
    if act.id is not None:
        return 1
    if queue is None or act.what in ("pause", "resume"):
        return 0
    if act.what == "purge":
        return queue.ready + queue.delayed + queue.blocked
    return queue.dead if act.reason is None else kind


def bounds(act: Act, queue: QueueStats | None) -> list[str]:
    """Return the names of the bounds that an act meets, which the page explains that asks for a confirmation."""
    dead = 0 if queue is None else queue.dead
    if act.what not in ("redrive", "discard") or act.id is not None:
        return []
    counted = ["counted"] if act.reason is not None and dead > LOOKED_AT_MAX else []
    return [*counted, "job"] if dead > CHOSEN_MAX else counted


class Doing:
    """Carries acts out on a broker."""

    def __init__(self, broker: Broker, overview: Callable[[], Overview], queues: Sequence[Queue[Any]]) -> None:
        self._broker = broker
        self._overview = overview
        self._typed = {queue.name: queue for queue in queues}

    def deed(self, act: Act, who: str, how_many: int) -> Deed:
        """Return the entry for the log before an act is done."""
        return Deed(who, act.what, act.queue, act.about, wanted=how_many)

    async def do(self, act: Act, body: str, rate: float | None, job: Job) -> None:
        """Carry out an act, and keep in `job` how far it has come."""
        match act.what:
            case "pause":
                await self._broker.pause(act.queue, group=act.group)
            case "resume":
                await self._broker.resume(act.queue, group=act.group)
            case "purge":
                job.done = await self._broker.purge(act.queue)
            case "cancel":
                job.done = int(await self._broker.cancel(act.queue, act.id or ""))
            case "edit":
                new = self.checked(act.queue, body)
                job.done = await self._broker.redrive(await self._untyped(act.queue), ids=[act.id or ""], body=new)
            case _:
                await self._of_dead_letters(act, rate, job)

    async def _of_dead_letters(self, act: Act, rate: float | None, job: Job) -> None:
        broker, queue = self._broker, act.queue

        def step(ids: Sequence[str]) -> Awaitable[int]:
            if act.what == "discard":
                return broker.discard(queue, ids=ids)
            return broker.redrive(queue, ids=ids, limit=None if act.id is not None else len(ids))

        is_each_step_cheap = State.READY in self._overview().sees  # on RabbitMQ, each step goes through all
        goes_by_steps = rate is not None or is_each_step_cheap
        is_of_all = act.id is None and act.reason is None
        ids = [act.id] if act.id is not None else await self._chosen(act) if goes_by_steps or not is_of_all else []
        if is_of_all and rate is None and (len(ids) == CHOSEN_MAX or not goes_by_steps):  # the engine does them all
            job.done = await (broker.redrive(queue) if act.what == "redrive" else broker.purge(queue, state=State.DEAD))
            return
        job.wanted = len(ids)
        if goes_by_steps:
            await in_slices(job, ids, step, rate)
        else:
            job.done = await step(ids)

    async def _chosen(self, act: Act) -> list[str]:
        """Return the ids of the dead letters of an act, fixed now, so that it ends even if they die again."""
        chosen: list[str] = []
        async for letter in dead_letters(self._overview(), act.queue, CHOSEN_MAX):
            fits = act.reason is None or (letter.reason or "") == act.reason
            if letter.id and fits and (act.error is None or error_kind(letter.error) == act.error):
                chosen.append(letter.id)
        return chosen

    async def _untyped(self, queue: str) -> str | Queue[Any]:
        """Return a queue without its type, which would drop fields that it does not know from an edited body."""
        declared = {known.name: known for known in await self._broker.queues()}
        return replace(declared[queue], body=None) if queue in declared else queue

    def checked(self, queue: str, text: str) -> Any:
        """Return an edited body. Raises `MessageError` when it is no JSON, or does not fit its queue's type."""
        try:
            plain = msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise MessageError(f"queue {queue!r}: the new body is not JSON: {error}. Nothing was changed.") from error
        typed = self._typed.get(queue)
        try:
            codec_for(typed and typed.body).decode(JSON, text.encode())
        except ValueError as error:
            raise MessageError(
                f"queue {queue!r}: the new body does not fit the queue's type: {error}. Nothing was changed."
            ) from error
        return plain
