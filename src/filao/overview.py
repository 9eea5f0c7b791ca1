"""What the dashboard needs of an engine beyond the calls for operators, and the log of what was done there.

Every look is bounded, whatever the queue holds: lists carry no bodies, and nothing here counts or walks a whole queue.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

import msgspec

from filao.engine import Finding, QueueStats, State, StoredMessage, instant
from filao.printable import some

GLANCE_MAX = 1_000  # messages of one list: some 10 ms of the database's time
ERROR_SEEN = 2_000  # characters that a list shows of a message's last error:
ERROR_HEAD = 100  # its beginning, where a text without a traceback says what happened,
ERROR_TAIL = ERROR_SEEN - ERROR_HEAD - 1  # and its end, where a traceback does
KIND_MAX = 80  # characters of a kind of error
BLOCKED_LOOKED_AT = 1_000  # blocked messages whose groups are told
DEEDS_KEPT = 10_000  # entries of the log; older ones are forgotten
DEED = "who, what, queue, about, wanted, done, id, at, ended_at, outcome"
"""The columns of the log's table, as `deed_of` reads them."""
_RAISED = re.compile(r"(?![^\Wa-z]+:  )((?:[A-Za-z_]\w*\.)*[A-Z]\w*)(?:: |:?$)")
"""A line that names what was raised. `DETAIL:  ` and its like are further lines of an error of PostgreSQL's."""
_NUMBER = re.compile(r"\d+")


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
    """leased (its first message is being worked on), delayed (its first message waits for another attempt), halted."""
    waiting: int
    """How many of the blocked messages that were looked at belong to it."""


class Deed(msgspec.Struct, frozen=True):
    """An entry of the log: what somebody did."""

    who: str
    what: str
    """redrive, discard, purge, pause, resume, cancel or edit."""
    queue: str
    about: str = ""
    """Which part of the queue: an id, a group, a reason and an error; empty: all of it."""
    wanted: int = 0
    """How many messages it was meant for; 0: it is not about messages."""
    done: int = 0
    number: int = 0
    at: datetime | None = None
    ended_at: datetime | None = None
    """None: it is still going on, or its process died."""
    outcome: str = ""
    """done, stopped, or what went wrong."""

    @property
    def expected(self) -> int:
        """How many messages it is about, as far as is known: what died just before it began was not counted yet."""
        return max(self.wanted, self.done)


def deed_of(row: Sequence[Any]) -> Deed:
    """Return an entry of the log from its row in the order of `DEED`."""
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


def miscounted(counted: int, state: str, there: int) -> str:
    """Return what the doctor says of a queue's counter that is not what can be counted."""
    are_counted, are_there = (some(counted, "message", ("is", "are")), f"{there:,} {'is' if there == 1 else 'are'}")
    return f"{are_counted} counted as {state}, and {are_there} there"


def deeds_finding(count: int, unended: Sequence[Deed]) -> list[Finding]:
    """Return what the doctor says of the log, nothing if it is empty; `unended` have no end yet, newest first."""
    entries = f"{count:,} {'entry' if count == 1 else 'entries'}"
    if not unended:
        return [Finding("dashboard's log", "ok", f"{entries}, each with its end")] if count else []
    last = unended[0]
    how_far = f", {last.done:,} of {some(last.expected, 'message')}" if last.expected else ""
    text = (
        f"{len(unended):,} of {entries} without an end: what goes on, and what a dashboard that died left half "
        f"done. The latest: {last.what} of queue {last.queue!r} by {last.who}{how_far}. See filao log"
    )
    return [Finding("dashboard's log", "note", text)]


class Overview(Protocol):
    """What one engine shows the dashboard."""

    @property
    def log(self) -> "Log | None":
        """The log of deeds; None where the engine has no place for one."""
        ...

    @property
    def glance_max(self) -> int:
        """The most messages of one list: `GLANCE_MAX`, or more where every list costs a walk through all messages."""
        ...

    @property
    def sees(self) -> tuple[State, ...]:
        """The states whose messages can be seen."""
        ...

    async def now(self) -> datetime:
        """Return the store's time, by which all times of its messages are; ours may be another after a jump."""
        ...

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return messages of one state in its order, from the one behind the id `after`; with `group`, only of that.

        Blocked messages, and those of a group, are in the order of sending. On PostgreSQL, if more than a thousand are
        due or lose their leases in the same millisecond, only the first thousand of them are returned.

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
        """Durably write a deed into the log before it is done, and return its number."""
        ...

    async def record(self, number: int, done: int, outcome: str = "") -> None:
        """Record how far a deed has come; with an `outcome`, that it has ended."""
        ...

    async def deeds(self, limit: int, before: int | None = None) -> Sequence[Deed]:
        """Return entries of the log, newest first, from the one below the number `before`."""
        ...


@runtime_checkable
class Seen(Protocol):
    """An engine that hands out its overview; all of ours do."""

    @property
    def overview(self) -> Overview: ...


@runtime_checkable
class Founding(Protocol):
    """An engine that makes its storage anew, empty, when it is opened where there is none."""

    def check_is_there(self) -> None:
        """Raise `EngineUnavailable` when there is none. Works while the engine is closed."""
        ...


def seen_error(error: str) -> str:
    """Return an error as lists show it: its beginning and its end, if it is long."""
    return error if len(error) <= ERROR_SEEN else f"{error[:ERROR_HEAD]}\n{error[-ERROR_TAIL:]}"


def error_kind(error: str) -> str:
    """Return what the errors of one kind of dead letters have in common: the class of the exception that was raised.

    For a text without one, it is the beginning of its first line, with `#` for each number. A whole error and the part
    of it that a list shows have the same kind.
    """
    error = seen_error(error)
    raised = _RAISED.match(raised_line(error))
    if raised is not None:
        return raised[1]
    line = error.strip().partition("\n")[0]
    return _NUMBER.sub("#", line)[:KIND_MAX]


def raised_line(error: str) -> str:
    """Return the line of an error that says what was raised: the last that names an exception, or the last of all."""
    lines = error.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])
