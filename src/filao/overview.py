"""What the dashboard sees of an engine beyond what every operator's call tells, and the log of what was done there.

A look is bounded, whatever lies in the queue: lists carry no bodies, and nothing here counts or walks a whole queue.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

import msgspec

from filao.engine import Finding, QueueStats, State, StoredMessage, instant
from filao.printable import some

GLANCE_MAX = 1_000  # messages of one list: some 10 ms of the database's time
ERROR_SEEN = (
    2_000  # characters of a last error that a list tells: what was raised stands in the last line of a traceback ...
)
ERROR_HEAD = 100  # ... and at the beginning of what is none
ERROR_TAIL = ERROR_SEEN - ERROR_HEAD - 1
BLOCKED_LOOKED_AT = 1_000  # blocked messages whose groups are told
DEEDS_KEPT = 10_000  # entries of the log; older ones are forgotten


class Glimpse(msgspec.Struct, frozen=True):
    """A message as a list shows it: without its body and its history."""

    id: str
    size: int
    """Bytes of its body."""
    headers: dict[str, str]
    attempts: int
    priority: int
    group: str | None
    sent_at: datetime
    at: datetime
    """As `StoredMessage.at`."""
    reason: str | None = None
    error: str = ""
    """The last error that was recorded, as `seen_error` cuts it."""
    consumer: str = ""
    """Of a leased message: the host and process that hold it."""


class HeldGroup(msgspec.Struct, frozen=True):
    """A group whose messages wait behind one another."""

    name: str
    why: str
    """leased (its first message is being worked on), delayed (that one waits for its next attempt), or halted."""
    waiting: int
    """How many of the blocked messages that were looked at are its."""


class Deed(msgspec.Struct, frozen=True):
    """An entry of the log: what somebody did."""

    who: str
    what: str
    """redrive, discard, purge, pause, resume, cancel or edit."""
    queue: str
    about: str = ""
    """What of the queue: an id, a group, a reason and an error; empty: all."""
    wanted: int = 0
    """How many messages it was to be; 0: it is not about messages."""
    done: int = 0
    number: int = 0
    at: datetime | None = None
    ended_at: datetime | None = None
    """None: it goes on, or its process died."""
    outcome: str = ""
    """done, stopped, or what went wrong."""


def deed_of(row: Sequence[Any]) -> Deed:
    """Return an entry of the log from the columns of its table, as `DEED` lists them."""
    who, what, queue, about, wanted, done, number, at, ended_at, outcome = row
    ended = None if ended_at is None else instant(ended_at)
    return Deed(who, what, queue, about, wanted, done, number, instant(at), ended, outcome)


def queue_finding(queue: QueueStats, run_out: int) -> Finding:
    """Return what the doctor says of a queue, of whose leases so many have run out and were not taken over."""
    said: list[str] = []
    if run_out:
        why = "nobody receives: start a consumer"
        if queue.receivers:
            why = "those who receive have not come for them: they are busy, or stuck"
        said.append(f"{some(run_out, 'lease')} that ran out: {'the queue is paused' if queue.paused else why}")
    if queue.paused:
        waiting = queue.ready + queue.delayed + queue.blocked
        said.append(f"paused, so nothing is delivered: {some(waiting, 'message')} until it is resumed")
    if queue.dead:
        said.append(some(queue.dead, "dead letter"))
    text = "; ".join(said) or f"{queue.ready:,} ready, {queue.leased:,} leased, {queue.delayed:,} delayed"
    return Finding(f"queue {queue.name}", "warning" if run_out else "note" if said else "ok", text)


def deeds_finding(count: int, unended: Sequence[Deed]) -> list[Finding]:
    """Return what the doctor says of the log, of an empty one nothing; `unended` have no end, the latest first."""
    if not unended:
        return [Finding("dashboard's log", "ok", f"{count:,} entries, each with its end")] if count else []
    last = unended[0]
    text = (
        f"{len(unended):,} of {count:,} entries have no end: they go on, or their dashboard died and what they did not "
        f"come to is not done. The latest: {last.what} of queue {last.queue!r} by {last.who}, {last.done:,} of "
        f"{last.wanted:,} messages. See filao log"
    )
    return [Finding("dashboard's log", "note", text)]


DEED = "who, what, queue, about, wanted, done, id, at, ended_at, outcome"


class Overview(Protocol):
    """One engine's; see the module."""

    @property
    def log(self) -> "Log | None":
        """The log of deeds; None where the engine has no place for one."""
        ...

    @property
    def glance_max(self) -> int:
        """How many messages one list tells at most: `GLANCE_MAX`, or more where each list costs a walk through all."""
        ...

    @property
    def sees(self) -> tuple[State, ...]:
        """The states of which messages can be seen."""
        ...

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return messages of one state in its order, from the one behind the id `after`; of one `group` only.

        Blocked ones, and those of a group, stand in the order of sending. On PostgreSQL, of more than a thousand that
        are due, or whose leases end, in the same millisecond, the first thousand are told.

        Raises `QueueNotFound`, and `ConfigurationError` when the message `after` has left the queue.
        """
        ...

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one message, whatever its state; None when the queue has none of this id. Raises `QueueNotFound`."""
        ...

    async def held_groups(self, queue: str) -> list[HeldGroup]:
        """Return the groups of the blocked messages that were sent first, and why each waits."""
        ...


class Log(Protocol):
    """The log of deeds, in the store."""

    async def begin(self, deed: Deed) -> int:
        """Write a deed into the log, durably, before it is done, and return its number."""
        ...

    async def record(self, number: int, done: int, outcome: str = "") -> None:
        """Write down how far a deed has come; with an `outcome` it has ended."""
        ...

    async def deeds(self, limit: int, before: int | None = None) -> Sequence[Deed]:
        """Return entries of the log, the latest first, from the one below the number `before`."""
        ...


class Seen(Protocol):
    """An engine that hands out its overview; all of ours do."""

    @property
    def overview(self) -> Overview: ...


def seen_error(error: str) -> str:
    """Return the beginning and the end of an error, as each engine's lists tell it."""
    return error if len(error) <= ERROR_SEEN else f"{error[:ERROR_HEAD]}\n{error[-ERROR_TAIL:]}"


def error_kind(error: str) -> str:
    """Return what dead letters of one kind have in common: the class of the exception that a traceback ends with.

    Of a text without one it is the beginning of its first line, with `#` for each number. It is the same of a whole
    error and of what a list tells of it.
    """
    error = seen_error(error)
    for line in reversed(error.splitlines()):
        raised = _RAISED.match(line)
        if raised is not None:
            return raised[1]
    line = error.strip().partition("\n")[0]
    return _NUMBER.sub("#", line)[:KIND_MAX]


KIND_MAX = 80  # characters
_RAISED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?:: |:?$)")
_NUMBER = re.compile(r"\d+")
