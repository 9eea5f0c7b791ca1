"""From a batch of operations to calls of the database's functions, and from what they return to results. No I/O here.

Operations of one kind on one queue become one call, whose arguments are arrays. An array of nothing but defaults is
NULL: most are, and writing them would cost more than the rest of a message.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from filao.draft import too_large
from filao.engine import (
    Ack,
    Delivery,
    Draft,
    Extend,
    Nack,
    Operation,
    Outcome,
    Receipt,
    Receive,
    Received,
    Reject,
    Release,
    Result,
    Send,
    Settle,
)
from filao.engines.postgresql.charset import Charset
from filao.engines.rows import lease_lost
from filao.engines.waiters import deal
from filao.errors import ConfigurationError, EngineUnavailable, FilaoError, LeaseLost
from filao.queue import Queue, full

Rows = Sequence[tuple[Any, ...]]
V = TypeVar("V")
Lock = tuple[str, Hashable]
"""A queue, and what may be locked there."""
O = TypeVar("O", bound=Operation)  # noqa: E741  # an operation

SEND = """
    SELECT * FROM filao.send(%s, %s, %s, %s, %s::integer[], %s::smallint[], filao.split(%s, %s::integer[]), %s::text[],
                             %s::bigint[], %s::integer[], %s::text[], %s::text[], %s::bigint[], %s::text[])
    ORDER BY place
"""
_SETTLE = """
    SELECT * FROM filao.settle(%s, %s, %s, %s, %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::bigint[])
"""
_EXTEND = "SELECT * FROM filao.extend(%s, %s, %s::bigint[], %s::bigint[], %s::bigint[])"
_RECEIVE = "SELECT * FROM filao.receive(%s, %s, %s, %s, %s, %s, %s)"
_LOCK = "SELECT filao.lock_groups(%s::integer[], %s::text[])"
CALL = "SELECT filao.call(%s::integer[], %s::integer[])"
NAMES = "SELECT name FROM filao.queue"
WHERE_NOW = "SELECT id, state::text, attempts FROM filao.message WHERE id = ANY (%s::bigint[])"


class Call(NamedTuple):
    """A statement, and how to read what it returns."""

    sql: str
    parameters: tuple[Any, ...]
    read: Callable[[Rows], Mapping[int, Result]]
    """From the rows to the result of each operation, by its place in the batch."""


class Setting(NamedTuple):
    """What the calls of a batch need to know besides its operations."""

    queues: Mapping[str, Queue]
    numbers: Mapping[str, int]
    """The queues' numbers in the database."""
    database: str
    """The random name of the database, with which ids begin that are older than version 2 of the schema."""
    process: int
    consumer: str
    token: Callable[[], int]
    moment: int | None
    """The time in milliseconds; None: the server's own."""
    later: bool = False
    """Whether the transaction is a user's, and may last."""
    fitted: Callable[[str], str] = str
    """Makes a text one that the database can hold."""


def calls(operations: Sequence[Operation], setting: Setting) -> list[Call]:
    """Return the calls that do a batch: the locks of groups are taken first; receives come last."""
    sends = _by_queue(operations, Send)
    settles = _by_queue(operations, Settle)
    extends = _by_queue(operations, Extend)
    made = [] if setting.later else _locks(sends, settles, setting)
    made += [_send(queue, some, setting) for queue, some in sends.items()]
    made += [_extend(queue, some, setting) for queue, some in extends.items()]
    made += [_settle(queue, some, setting) for queue, some in settles.items()]
    receives = _grouped(operations, Receive, lambda receive: (receive.queue, receive.lease))
    return made + [_receive(some, setting) for some in receives.values()]


def fresh(operations: Iterable[Operation]) -> dict[str, int]:
    """Return how many messages of each queue may have become ready by these operations, for those that wait."""
    found: defaultdict[str, int] = defaultdict(int)
    for operation in operations:
        if isinstance(operation, Send):
            found[operation.queue] += len(operation.drafts)
        elif isinstance(operation, Settle):
            plain = isinstance(operation.outcome, Ack) and operation.delivery.group is None
            found[operation.queue] += not plain
    return {queue: count for queue, count in found.items() if count}


def lock_of(operation: Operation, queues: Mapping[str, Queue]) -> Lock | None:
    """Return what an operation may need that another transaction has locked; None: nothing.

    That is the row of its queue, keys and groups, or a message. Operations that may need the same have the same.
    """
    if isinstance(operation, Receive):
        return None
    if not isinstance(operation, Send):
        return operation.queue, operation.delivery.group or operation.delivery.handle
    rules = queues.get(operation.queue)
    if rules is not None and rules.max_length is not None:
        return operation.queue, None
    needs = tuple((draft.dedup_key, draft.message_id, draft.group) for draft in operation.drafts)
    return None if all(value is None for need in needs for value in need) else (operation.queue, needs)


def deleted(operation: Operation) -> FilaoError:
    """Return the error of an operation in a user's transaction whose queue was deleted since this process knew it."""
    if not isinstance(operation, Send | Receive):
        return lease_lost(operation.delivery, None, queue_deleted=True)
    return EngineUnavailable(
        f"queue {operation.queue!r} was deleted, and may have been declared anew, since this broker used it last. "
        f"Nothing of this transaction is done; try again."
    )


def unwritable(operations: Sequence[Operation], charset: Charset) -> dict[int, FilaoError]:
    """Return the errors of sends whose text the database cannot hold, by their places."""
    found: dict[int, FilaoError] = {}
    if not charset.is_full:
        for place, operation in enumerate(operations):
            try:
                for draft in operation.drafts if isinstance(operation, Send) else ():
                    charset.check(operation.queue, draft)
            except FilaoError as error:
                found[place] = error
    return found


def _grouped(
    operations: Sequence[Operation], kind: type[O], key: Callable[[O], Hashable]
) -> dict[Any, list[tuple[int, O]]]:
    found: defaultdict[Any, list[tuple[int, O]]] = defaultdict(list)
    for place, operation in enumerate(operations):
        if isinstance(operation, kind):
            found[key(operation)].append((place, operation))
    return dict(sorted(found.items(), key=repr))


def _by_queue(operations: Sequence[Operation], kind: type[O]) -> dict[str, list[tuple[int, O]]]:
    return _grouped(operations, kind, attrgetter("queue"))


def _locks(
    sends: Mapping[str, list[tuple[int, Send]]], settles: Mapping[str, list[tuple[int, Settle]]], setting: Setting
) -> list[Call]:
    wanted = {
        (setting.numbers[queue], draft.group)
        for queue, some in sends.items()
        for _, send in some
        for draft in send.drafts
        if draft.group is not None
    } | {
        (setting.numbers[queue], settle.delivery.group)
        for queue, some in settles.items()
        for _, settle in some
        if settle.delivery.group is not None
    }
    if not wanted:
        return []
    pairs = list(wanted)
    return [Call(_LOCK, ([queue for queue, _ in pairs], [group for _, group in pairs]), _nothing)]


def _nothing(rows: Rows) -> dict[int, Result]:
    return {}


# --- send ------------------------------------------------------------------------------------------------------------


def _send(queue: str, placed: Sequence[tuple[int, Send]], setting: Setting) -> Call:
    places, sends = [place for place, _ in placed], [send for _, send in placed]
    salt = new_salt()
    parameters = send_parameters(sends, setting.numbers[queue], setting.moment, salt, later=setting.later)
    return Call(SEND, parameters, partial(_sent, places, sends, setting.queues[queue], salt))


def _sent(places: Sequence[int], sends: Sequence[Send], rules: Queue, salt: int, rows: Rows) -> dict[int, Result]:
    return dict(zip(places, receipts(rows, sends, rules, salt), strict=True))


def new_salt() -> int:
    """Draw the random first part of the ids of messages that are sent together, as a bigint."""
    return int.from_bytes(os.urandom(8), "big", signed=True)


def _prefix(salt: int) -> str:
    return f"{salt & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def send_parameters(
    sends: Sequence[Send], number: int, moment: int | None, salt: int, *, later: bool
) -> tuple[Any, ...]:
    """Return the arguments of `filao.send`."""
    drafts = [draft for send in sends for draft in send.drafts]
    ops = [op for op, send in enumerate(sends) for _ in send.drafts]
    return (
        *(number, moment, later, salt, _numbers(ops), _numbers([draft.kind for draft in drafts])),
        *(b"".join([draft.content for draft in drafts]), _numbers([len(draft.content) for draft in drafts])),
        _column(drafts, lambda draft: draft.headers),
        _column(drafts, lambda draft: _milliseconds(draft.delay) or None),
        _column(drafts, lambda draft: draft.priority or None),
        _column(drafts, lambda draft: draft.group),
        _column(drafts, lambda draft: draft.dedup_key),
        _column(drafts, lambda draft: _milliseconds(draft.ttl)),
        _column(drafts, lambda draft: draft.message_id),
    )


def receipts(rows: Rows, sends: Sequence[Send], rules: Queue, salt: int) -> list[list[Receipt] | FilaoError]:
    """Return the result of each send, from the rows of `filao.send`."""
    prefix = _prefix(salt)
    drafts = [draft for send in sends for draft in send.drafts]
    stored: list[list[Receipt]] = [[] for _ in sends]
    refused: dict[int, FilaoError] = {}
    for place, which, number, came_first, problem, detail in rows:
        op = int(which)
        if problem is not None:
            refused[op] = _refusal(rules, problem, number, detail)
        elif came_first is not None:
            stored[op].append(Receipt(came_first, True))
        else:
            stored[op].append(Receipt(drafts[int(place) - 1].message_id or f"{prefix}-{number}"))
    return [refused.get(op, found) for op, found in enumerate(stored)]


def _refusal(rules: Queue, problem: str, new: int, detail: int) -> FilaoError:
    if problem == "too large":
        return too_large(rules.name, detail, rules.body_max)
    if problem == "isolated":
        return ConfigurationError(
            f"queue {rules.name!r} has a max_length, which cannot be exact in a transaction that is REPEATABLE READ or "
            f"SERIALIZABLE: it does not see what others have sent since it began. Nothing was sent. Send within= a "
            f"READ COMMITTED transaction, or by an outbox."
        )
    return full(rules, detail, new)


def _column(drafts: Sequence[Draft], field: Callable[[Draft], V]) -> list[V] | None:
    values = [field(draft) for draft in drafts]
    return values if any(value is not None for value in values) else None


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


# --- settle and extend -----------------------------------------------------------------------------------------------


def _settle(queue: str, settles: Sequence[tuple[int, Settle]], setting: Setting) -> Call:
    places = [place for place, _ in settles]
    told = [_told(settle.outcome) for _, settle in settles]
    errors = [setting.fitted(error) for _, error, _ in told]
    parameters = (
        *(setting.numbers[queue], setting.moment, setting.later, setting.consumer),
        *_leases([settle.delivery for _, settle in settles]),
        "{" + ",".join([outcome for outcome, _, _ in told]) + "}",
        errors if any(errors) else None,
        [delay for _, _, delay in told] if any(delay is not None for _, _, delay in told) else None,
    )
    return Call(_SETTLE, parameters, partial(_lost, places))


def _told(outcome: Outcome) -> tuple[str, str, int | None]:
    match outcome:
        case Ack():
            return "ack", "", None
        case Nack(delay, error):
            return "nack", error, _milliseconds(delay)
        case Reject(error, malformed):
            return "malformed" if malformed else "rejected", error, None
        case Release(delay):
            return "release", "", _milliseconds(delay) or None


def _extend(queue: str, extends: Sequence[tuple[int, Extend]], setting: Setting) -> Call:
    places = [place for place, _ in extends]
    lengths = [_milliseconds(extend.seconds) for _, extend in extends]
    leases = _leases([extend.delivery for _, extend in extends])
    return Call(_EXTEND, (setting.numbers[queue], setting.moment, *leases, lengths), partial(_lost, places))


def _leases(deliveries: Sequence[Delivery]) -> tuple[str, str]:
    return _numbers([delivery.handle for delivery in deliveries]), _numbers([delivery.token for delivery in deliveries])


def _numbers(values: Iterable[int]) -> str:
    """Write an array of numbers as text; the driver would take five times as long."""
    return "{" + ",".join(map(str, values)) + "}"


LOST = LeaseLost("")
"""Stands for the error of a lost lease until it is known what became of the message: see `rows.lease_lost`."""


def _lost(places: Sequence[int], rows: Rows) -> dict[int, Result]:
    return {places[row[0] - 1]: LOST for row in rows}


# --- receive ---------------------------------------------------------------------------------------------------------


def _receive(receives: Sequence[tuple[int, Receive]], setting: Setting) -> Call:
    first = receives[0][1]
    token = setting.token()
    most = sum(receive.limit for _, receive in receives)
    waiting = sum(receive.waiting for _, receive in receives)
    number, lease = setting.numbers[first.queue], _milliseconds(first.lease)
    parameters = (number, setting.moment, setting.process, lease, token, most, waiting)
    return Call(_RECEIVE, parameters, partial(_received, receives, token, setting.database))


def _received(receives: Sequence[tuple[int, Receive]], token: int, database: str, rows: Rows) -> dict[int, Result]:
    queue = receives[0][1].queue
    deliveries = [_delivery(queue, token, database, row) for row in rows if row[0] is not None]
    due_in = rows[-1][-1] / 1000 if rows and rows[-1][-1] is not None else None
    hands = deal(deliveries, [receive.limit for _, receive in receives])
    return {
        place: Received(hand, due_in if len(hand) < max(receive.waiting, 1) else None)
        for (place, receive), hand in zip(receives, hands, strict=True)
    }


def _delivery(queue: str, token: int, database: str, row: tuple[Any, ...]) -> Delivery:
    number, priority, attempt, group, dedup_key, message_id, headers, kind, content, sent_at, *rest = row
    failures, crashed, salt, _ = rest
    about = (priority, group, dedup_key, message_id, headers, kind, content, sent_at, failures)
    name = message_id or f"{database if salt is None else _prefix(salt)}-{number}"
    return Delivery(queue, name, number, token, attempt, *about, bool(crashed))
