"""A queue's name and rules, and the decisions that follow from them alone.

Everything here is a frozen value or a pure function: no clock, no chance, no storage. Engines store the rules beside
the queue's name, so that producers and consumers, in any process, live by the same ones.
"""

import difflib
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from types import UnionType
from typing import Any, Generic, Literal

import msgspec
from typing_extensions import TypeVar

from filao.checks import check_count, check_duration, check_name, check_number
from filao.codec import shown
from filao.errors import ConfigurationError, QueueFull, QueueNotFound
from filao.printable import some

T = TypeVar("T", default=Any)  # a queue without a body type carries plain JSON: dicts, lists, strings, numbers

BODY_MAX = 256 * 1024  # bytes; a message is a note, not a parcel: send a reference to what is larger
BODY_MAX_EVER = 64 * 1024 * 1024  # bytes; a queue may raise its own limit up to here
LEASE_MAX = 7 * 86_400.0  # seconds
COMPARED_MAX = 500  # names that an unknown one is compared with: 30 ms, during which the event loop stands still

EMULATED = ("delay",)  # what a queue may ask an engine to imitate

Overflow = Literal["refuse", "drop_oldest"]
Expiry = Literal["dead", "drop"]
GroupFailure = Literal["block", "skip"]
GroupDead = Literal["continue", "halt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long a failed message waits before its next attempt: exponential, with jitter, under a ceiling.

    The nth failure waits `first * factor**(n-1)` seconds, at most `ceiling`, of which the share `jitter` is random, so
    that messages that failed together do not all return together.
    """

    first: float = 1.0
    factor: float = 2.0
    ceiling: float = 300.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        check_duration("Backoff", "first", self.first)
        check_duration("Backoff", "ceiling", self.ceiling)
        check_number("Backoff", "factor", self.factor, least=1.0, most=100.0)
        check_number("Backoff", "jitter", self.jitter, least=0.0, most=1.0)

    def delay(self, attempt: int, chance: float) -> float:
        """Return the seconds to wait after the nth failed `attempt`; `chance` is a random number from 0 to 1."""
        exponent = min(attempt - 1, 64)  # past this any factor above 1 has met any ceiling; it keeps floats finite
        whole = min(self.ceiling, self.first * self.factor**exponent)
        return whole * (1.0 - self.jitter * chance)


@dataclass(frozen=True)  # without slots, or Queue[Claim](…) would fail before Python 3.13
class Queue(Generic[T]):
    """A queue's name, the type of its bodies, and its rules: declared once, shared by producers and consumers.

    All durations are seconds. `body` is a type that msgspec or pydantic can check: a dataclass, an attrs class, a
    Struct, a TypedDict, a pydantic model, or one built of these, such as `list[Claim]` or a union. Of a union type
    checkers must be told: `queue: Queue[Claim | None] = …`. Without it, bodies are plain JSON or bytes. A body that
    would not come back equal, in value and type, is not sent.
    """

    name: str
    body: type[T] | UnionType | None = None
    _: KW_ONLY
    lease: float = 30.0
    """How long a consumer may hold a message before another may take it. Extend it for longer work."""
    max_attempts: int = 5
    """A message that has failed this many times becomes a dead letter."""
    backoff: Backoff = field(default_factory=Backoff)
    """How long a failed message waits before its next attempt."""
    ttl: float | None = None
    """Messages older than this are no longer delivered, unless their sender gave another `ttl`.

    None: they never expire.
    """
    on_expiry: Expiry = "dead"
    """A message that outlived its `ttl` becomes a dead letter, or is dropped."""
    dedup_window: float = 300.0
    """How long a `dedup_key` is remembered after its message has ended."""
    max_length: int | None = None
    """How many messages may wait or be worked on at once; dead letters do not count."""
    overflow: Overflow = "refuse"
    """At `max_length`: refuse the new message with `QueueFull`, or make the oldest waiting one a dead letter."""
    group_failure: GroupFailure = "block"
    """While the head of a group waits for its next attempt, the group waits with it or goes on without it."""
    group_dead: GroupDead = "continue"
    """When a message of a group dies, the group goes on or halts until an operator resumes it."""
    body_max: int = BODY_MAX
    """The largest body in bytes."""
    history: bool = False
    """Whether each event in the life of its messages is recorded, for `Broker.trace`."""
    history_window: float = 7 * 86_400.0
    """How long an event is kept."""
    emulate: tuple[str, ...] = ()
    """What the engine may imitate where it cannot do it itself, at the price that the docs name: `"delay"`."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_duration(f"queue {self.name!r}", "lease", self.lease, least=0.001, most=LEASE_MAX)
        check_duration(f"queue {self.name!r}", "dedup_window", self.dedup_window)
        check_duration(f"queue {self.name!r}", "history_window", self.history_window, least=0.001)
        if self.ttl is not None:
            check_duration(f"queue {self.name!r}", "ttl", self.ttl, least=0.001)
        check_count(f"queue {self.name!r}", "max_attempts", self.max_attempts, most=1_000_000)
        check_count(f"queue {self.name!r}", "body_max", self.body_max, most=BODY_MAX_EVER)
        if self.max_length is not None:
            check_count(f"queue {self.name!r}", "max_length", self.max_length, most=2**53)
        if not isinstance(self.backoff, Backoff):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"queue {self.name!r}: backoff is {shown(self.backoff)}; give a filao.Backoff(first=…)"
            )
        if (
            not isinstance(self.emulate, tuple)  # pyright: ignore[reportUnnecessaryIsInstance]
            or not set(self.emulate) <= set(EMULATED)
        ):
            raise ConfigurationError(
                f"queue {self.name!r}: emulate is {shown(self.emulate)}; it must be a tuple of some of: "
                f"{', '.join(EMULATED)}"
            )
        try:
            hash(self.body)  # every type can be hashed
        except TypeError as error:
            raise ConfigurationError(
                f"queue {self.name!r}: {shown(self.body)} cannot be the type of its bodies"
            ) from error
        for rule, allowed in _CHOICES.items():
            if getattr(self, rule) not in allowed:
                raise ConfigurationError(
                    f"queue {self.name!r}: {rule} is {shown(getattr(self, rule))}; it must be one of "
                    f"{', '.join(map(str, allowed))}"
                )


_CHOICES = {
    "overflow": ("refuse", "drop_oldest"),
    "on_expiry": ("dead", "drop"),
    "group_failure": ("block", "skip"),
    "group_dead": ("continue", "halt"),
    "history": (False, True),
}
_RULES = (
    "lease",
    "max_attempts",
    "backoff",
    "ttl",
    "on_expiry",
    "dedup_window",
    "max_length",
    "overflow",
    "group_failure",
    "group_dead",
    "body_max",
    "history",
    "history_window",
    "emulate",
)


def rules_to_json(queue: "Queue[Any]") -> str:
    """Write a queue's rules (all but its name and body type) as the JSON that engines store."""
    return msgspec.json.encode({rule: getattr(queue, rule) for rule in _RULES}).decode()


def rules_from_json(name: str, rules: str) -> "Queue[Any]":
    """Read back what `rules_to_json` wrote, and ignore rules that only a newer version knows."""
    try:
        stored = msgspec.json.decode(rules, type=dict[str, Any])
        known = {rule: stored[rule] for rule in _RULES if rule in stored and rule not in ("backoff", "emulate")}
        emulate = tuple(what for what in stored.get("emulate", ()) if what in EMULATED)
        return Queue(name, backoff=Backoff(**stored.get("backoff", {})), emulate=emulate, **known)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"queue {name!r}: its stored rules are none: {error}") from error


def retry_delay(queue: "Queue[Any]", attempt: int, chance: float) -> float | None:
    """Return the seconds until a message that failed its nth `attempt` is tried again; None when it is dead."""
    return None if attempt >= queue.max_attempts else queue.backoff.delay(attempt, chance)


def check_halts(queue: Queue[Any], group: str) -> None:
    """Raise `ConfigurationError` unless the groups of the queue can halt."""
    if queue.group_dead != "halt":
        raise ConfigurationError(
            f"queue {queue.name!r}: group {group!r} cannot be paused, because the queue's rule is group_dead="
            f"{queue.group_dead!r}. Nothing was changed; declare it with group_dead='halt', or pause the whole queue."
        )


def full(queue: "Queue[Any]", pending: int, new: int) -> QueueFull:
    """Return the error for a send of so many new messages to a queue in which so many are pending."""
    most = queue.max_length or 0
    wait = some(pending, "message", ("waits or is being worked on", "wait or are being worked on"))
    remedy = "Add consumers, or send later." if new <= most else f"Send at most {most:,} at once."
    return QueueFull(
        f"queue {queue.name!r} is full: {wait}, its max_length is {most:,}, "
        f"and {new:,} more came. Nothing was stored. {remedy}"
    )


def not_found(name: str, known: Iterable[str]) -> QueueNotFound:
    """Return the error for a queue that nobody declared, which names those that the caller may have meant."""
    names = sorted(other for other in islice(known, COMPARED_MAX) if other != name)  # it may be deleted but still known
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "No queue is declared here yet."
    return QueueNotFound(f"queue {name!r} is not declared. {hint} Declare it with broker.declare(Queue({name!r})).")


def name_of(queue: "str | Queue[Any]") -> str:
    """Return the name that a caller means, or raise `ConfigurationError`."""
    name = queue.name if isinstance(queue, Queue) else queue
    check_name(name)
    return name
