"""What each page shows, read from the last look and, for one queue or one message, from the store.

A view returns the values of its template; nothing here knows how they are drawn. All lists are bounded.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from filao.broker import Broker, session_of
from filao.dashboard.shown import NOTHING, body_of, json_text
from filao.dashboard.triage import LOOKED_AT_MAX, Triage
from filao.dashboard.watch import Look
from filao.engine import Event, Feature, QueueStats, Receiver, State, StoredMessage
from filao.errors import ConfigurationError
from filao.overview import GLANCE_MAX, Glimpse, Overview
from filao.printable import printable_json
from filao.process import REPORT_STALE
from filao.queue import Queue, not_found

QUEUES_SHOWN = 100  # queues of one page
MESSAGES_SHOWN = 50  # messages of one page
GROUPS_SHOWN = 50
KINDS_SHOWN = 200  # kinds of dead letters of one page
HELD_SHOWN = 100  # leases of one queue on the page of the processes
HELD_QUEUES = 20  # queues whose leases that page shows
PROCESSES_SHOWN = 100  # on that page
DEEDS_SHOWN = 100  # entries of one page of the log
KINDS_WITHIN = 1.5  # seconds that a page waits for dead letters to be told apart
SORTS = ("age", "ready", "dead", "name")

Redact = Callable[[StoredMessage], StoredMessage]
"""Returns a message as it may be shown, for example `msgspec.structs.replace(message, body=…)`."""
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a page was asked for."""

    look: Look
    query: Mapping[str, str]


class Views:
    """The views of one dashboard, one method for each page."""

    def __init__(self, broker: Broker, overview: Callable[[], Overview], redact: Redact | None) -> None:
        self._broker = broker
        self._overview = overview
        self._redact = redact
        self.triage: Triage = Triage(overview)

    # --- queues ------------------------------------------------------------------------------------------------------

    async def queues(self, asked: Asked) -> Values:
        """Return a page of queues, in the order that was asked for: by oldest age, unless another is given."""
        sorts = SORTS if Feature.COUNTERS in self._broker.features else SORTS[1:]
        sort = asked.query.get("sort", "")
        sort = sort if sort in sorts else sorts[0]
        words = asked.query.get("q", "").strip().lower()
        fitting = [one for one in asked.look.queues.values() if words in one.name.lower()]
        first = min(whole(asked.query.get("from", "")), max(0, len(fitting) - 1) // QUEUES_SHOWN * QUEUES_SHOWN)
        most = heapq.nsmallest(first + QUEUES_SHOWN, fitting, key=_rank(sort))
        shown = most[first:]
        total = {state: sum(getattr(one, state) for one in fitting) for state in State}
        return {
            "queues": shown,
            "sort": sort,
            "sorts": sorts,
            "q": asked.query.get("q", "").strip(),
            "count": len(fitting),
            "total": total,
            "first": first,
            "next": first + QUEUES_SHOWN if first + QUEUES_SHOWN < len(fitting) else None,
            "previous": max(0, first - QUEUES_SHOWN) if first else None,
        }

    async def queue(self, asked: Asked) -> Values:
        """Return all about one queue: counters, rules, groups that wait, and messages of one state."""
        queue = stats_of(asked)
        name, overview = queue.name, self._overview()
        state = asked.query.get("state", "")
        if state not in overview.sees:
            state = next((one for one in overview.sees if getattr(queue, one)), overview.sees[0])
        groups = await overview.held_groups(name) if queue.blocked else []
        values: Values = {
            "queue": queue,
            "groups": groups[:GROUPS_SHOWN],
            "groups_hidden": max(0, len(groups) - GROUPS_SHOWN),
            "sees": overview.sees,
            "state": State(state),
        }
        is_live = "live" in asked.query
        rules = await session_of(self._broker).engine.find(name) if groups or not is_live else None
        values["may_halt"] = rules is not None and rules.group_dead == "halt"
        if is_live or rules is None:
            return values
        values["rules"] = _rules(rules)
        return values | await self._listed(asked, name, State(state))

    async def _listed(self, asked: Asked, name: str, state: State) -> Values:
        """Return a page of messages of one state behind `after`; with a filter, those that fit of the next thousand."""
        group = (asked.query.get("group") or None) if Feature.GROUPS in self._broker.features else None
        header = asked.query.get("header", "").strip()
        older = _seconds(asked.query.get("older", ""))
        is_filtered = bool(header) or older is not None
        limit = GLANCE_MAX if is_filtered else MESSAGES_SHOWN + 1
        after = asked.query.get("after") or None
        found = await self._overview().glance(name, state, limit=limit, after=after, group=group)
        now = asked.look.now()
        fitting = [one for one in found if _fits(one, header, now, older)]
        shown = fitting[:MESSAGES_SHOWN]
        last = shown if len(fitting) > MESSAGES_SHOWN else found if len(found) == limit else []
        return {
            "messages": shown,
            "looked_at": len(found) if is_filtered else None,
            "next": last[-1].id if last else None,
            "after": after,
            "group": group or "",
            "header": header,
            "older": asked.query.get("older", "").strip(),
            "is_redacted": self._redact is not None,
        }

    # --- one message -------------------------------------------------------------------------------------------------

    async def message(self, asked: Asked) -> Values:
        """Return all about one message."""
        name, message_id = asked.query.get("queue", ""), asked.query.get("id", "")
        found = await self._overview().find(name, message_id) if message_id else None
        events = await self._events(name, message_id) if message_id else []
        if found is None and not events:
            raise NoMessageError(name, message_id)
        values: Values = {"message": found, "trouble_of_redaction": "", "body": None, "editable": "", "events": events}
        if found is None:  # it is gone, and its queue remembers what became of it
            return values | {"name": name, "id": message_id, "is_redacted": self._redact is not None}
        try:
            found = found if self._redact is None else self._redact(found)
            body = body_of(found.body, whole="whole" in asked.query)
        except Exception as error:  # the user's own function failed: nothing of the message is shown
            blank = msgspec.structs.replace(found, body=None, headers={}, history=())
            return values | {"message": blank, "trouble_of_redaction": type(error).__name__, "is_redacted": True}
        is_editable = found.state is State.DEAD and self._redact is None and not isinstance(found.body, bytes)
        editable = printable_json(json_text(found.body).encode()).decode() if is_editable else ""
        values |= {"message": found, "body": body, "editable": editable, "timeline": _timeline(found)}
        return values | {"is_redacted": self._redact is not None}

    async def _events(self, queue: str, message_id: str) -> list[Event]:
        """Return what happened to a message, as far as its queue remembers."""
        tracing = session_of(self._broker).engine.operators.tracing
        found = [] if tracing is None else await tracing.trace(message_id)
        return [event for event in found if event.queue == queue]

    # --- processes ---------------------------------------------------------------------------------------------------

    async def processes(self, asked: Asked) -> Values:
        """Return the processes that receive, and what each holds."""
        processes: dict[str, Process] = {}
        for queue in asked.look.queues.values():
            for one in queue.receivers:
                processes.setdefault(one.name, Process(one, {}, [])).held[queue.name] = one.held
        overview = self._overview()
        cut: set[str] = set()
        if State.LEASED in overview.sees:
            held = sorted((one for one in asked.look.queues.values() if one.leased), key=lambda one: -one.leased)
            cut = {queue.name for queue in held}
            for queue in held[:HELD_QUEUES]:
                found = await overview.glance(queue.name, State.LEASED, limit=HELD_SHOWN)
                for message in found:
                    if message.consumer in processes:
                        processes[message.consumer].leases.append((queue.name, message))
                if len(found) < HELD_SHOWN:
                    cut.remove(queue.name)
        ranked = sorted(processes.values(), key=lambda one: (not one.is_stale, one.receiver.name))
        hidden = max(0, len(ranked) - PROCESSES_SHOWN)
        return {"processes": ranked[:PROCESSES_SHOWN], "hidden": hidden, "cut": cut, "now": asked.look.now()}

    # --- dead letters ------------------------------------------------------------------------------------------------

    async def dead(self, asked: Asked) -> Values:
        """Return the dead letters by kind."""
        only = asked.query.get("queue", "")
        if only and only not in asked.look.queues:
            raise not_found(only[:200], asked.look.queues)
        queues = {name: one for name, one in asked.look.queues.items() if not only or name == only}
        triaged, is_latest = await self.triage.kinds(queues, 0.0 if "live" in asked.query else KINDS_WITHIN)
        kinds = [kind for one in triaged for kind in one.kinds]
        cut = [one for one in triaged if one.counted[0] > one.looked_at >= LOOKED_AT_MAX]
        return {
            "kinds": kinds[:KINDS_SHOWN],
            "kinds_hidden": max(0, len(kinds) - KINDS_SHOWN),
            "is_latest": is_latest,
            "cut": [(one.kinds[0].queue, one.looked_at, one.counted[0]) for one in cut],
            "total": sum(one.dead for one in queues.values()),
            "only": only,
        }

    # --- the log -----------------------------------------------------------------------------------------------------

    async def log(self, asked: Asked) -> Values:
        """Return a page of the log: who did what."""
        kept = self._overview().log
        if kept is None:
            return {"deeds": [], "keeps_log": False, "next": None}
        before = whole(asked.query.get("before", "")) or None
        deeds = await kept.deeds(DEEDS_SHOWN + 1, before)
        more = len(deeds) > DEEDS_SHOWN
        return {
            "deeds": deeds[:DEEDS_SHOWN],
            "keeps_log": True,
            "next": deeds[DEEDS_SHOWN - 1].number if more else None,
        }


class NoMessageError(ConfigurationError):
    """A queue has no message with this id, or no longer has one."""

    def __init__(self, queue: str, message_id: str) -> None:
        super().__init__(f"queue {queue!r} has no message {message_id[:300]!r}; it may be done and gone by now.")


@dataclass(frozen=True, slots=True)
class Process:
    """A process that receives, with what it holds of all queues."""

    receiver: Receiver
    held: dict[str, int]
    """How many messages of each queue it holds."""
    leases: list[tuple[str, Glimpse]]

    def hidden(self, cut: Collection[str]) -> int:
        """Return how many of its leases are not listed, because those of these queues are not all listed."""
        held = sum(count for name, count in self.held.items() if name in cut)
        return max(0, held - sum(name in cut for name, _ in self.leases))

    @property
    def is_stale(self) -> bool:
        """Whether its worker's report is too old to be believed."""
        return (self.receiver.reported_ago or 0.0) > REPORT_STALE


def stats_of(asked: Asked) -> QueueStats:
    """Return the queue that a page is about. Raises `QueueNotFound`."""
    name = asked.query.get("name", "")
    found = asked.look.queues.get(name)
    if found is None:
        raise not_found(name[:200], asked.look.queues)
    return found


def oldest_age(queue: QueueStats) -> float | None:
    """Return the age in seconds of the oldest message that is ready, blocked or overdue; None when there is none."""
    ages = [age for age in (queue.oldest_ready_age, queue.oldest_delayed_age, queue.oldest_blocked_age) if age]
    return max(ages, default=None)


def whole(text: str) -> int:
    """Return a whole number from a URL; 0 for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else 0


def _rank(sort: str) -> Callable[[QueueStats], tuple[float, str]]:
    def rank(one: QueueStats) -> tuple[float, str]:
        if sort == "name":
            return 0.0, one.name
        figure = oldest_age(one) or 0.0 if sort == "age" else float(getattr(one, sort))
        return -figure, one.name

    return rank


def _rules(queue: Queue[Any]) -> Sequence[tuple[str, object]]:
    backoff = queue.backoff
    return [
        ("lease", f"{queue.lease:g} s"),
        ("max_attempts", queue.max_attempts),
        ("backoff", f"{backoff.first:g} s \N{MULTIPLICATION SIGN} {backoff.factor:g}ⁿ ≤ {backoff.ceiling:g} s"),
        ("ttl", NOTHING if queue.ttl is None else f"{queue.ttl:g} s"),
        ("on_expiry", queue.on_expiry),
        ("dedup_window", f"{queue.dedup_window:g} s"),
        ("max_length", NOTHING if queue.max_length is None else f"{queue.max_length:,}"),
        ("overflow", queue.overflow),
        ("group_failure", queue.group_failure),
        ("group_dead", queue.group_dead),
        ("body_max", f"{queue.body_max:,}"),
        ("history", f"{queue.history_window:g} s" if queue.history else NOTHING),
    ]


def _fits(message: Glimpse, header: str, now: datetime, older: float | None) -> bool:
    if older is not None and (now - message.sent_at).total_seconds() < older:
        return False
    if not header:
        return True
    name, equals, value = header.partition("=")
    found = message.headers.get(name.strip())
    return found is not None and (not equals or value.strip() in found)


def _seconds(text: str) -> float | None:
    try:
        return max(0.0, float(text.replace(",", "."))) if text.strip() else None
    except ValueError:
        return None


def _timeline(message: StoredMessage) -> list[tuple[datetime, str, int, str]]:
    """Return what happened to a message and when, at which attempt (0: none), with a detail."""
    happened = [(message.sent_at, "sent", 0, "")]
    happened += [(one.at, one.outcome, one.attempt, one.consumer) for one in message.history]
    if message.state is not State.READY or message.at != message.sent_at:
        happened.append((message.at, f"at_{message.state}", 0, message.consumer or message.reason or ""))
    if message.expires_at is not None:
        happened.append((message.expires_at, "expires", 0, ""))
    return sorted(happened, key=lambda one: one[0])
