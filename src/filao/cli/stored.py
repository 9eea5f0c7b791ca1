"""`filao peek`, `dead`, `redrive`, `discard` and `purge`: look at stored messages, send them back, or delete them."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import click
import msgspec

from filao.broker import overview_of
from filao.checks import PEEK_MAX
from filao.cli.lines import json_text
from filao.cli.shell import (
    Number,
    addressed,
    as_json,
    broker_at,
    confirmed,
    is_terminal,
    note,
    print_lines,
    shown_body,
    usage,
)
from filao.cli.tables import draw_stored, tell
from filao.engine import REASONS, QueueStats, State, StoredMessage
from filao.errors import ConfigurationError
from filao.overview import error_kind
from filao.printable import some
from filao.slices import Tally
from filao.sync import Broker, call_on, door_of

SEARCHED_MAX = 1_000_000  # messages that one search looks at: some minutes
_SEARCHED_AT_ONCE = 1_000  # messages of one page: with bodies of 256 KiB, what memory holds
_BEGUN_AGAIN_MAX = 20  # times that a search begins again, because the message behind which it was to go on has left

_Choice = Callable[[StoredMessage], bool]
_json_option = click.option("--json", "wants_json", is_flag=True, help="JSON lines, also on a terminal.")
_state = click.Choice([state.value for state in State])
_page = click.IntRange(1, PEEK_MAX)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--state", type=_state, help="Default ready; with --id, any.")
@click.option("--limit", type=_page, default=10, metavar="N", help="At most so many, up to 10000. Default 10.")
@click.option("--after", metavar="ID", help="Go on behind this message, the last one of the page before.")
@click.option("--id", "wanted", metavar="ID", help="Tell all of this one.")
@_json_option
def peek(
    *,
    arguments: tuple[str, ...],
    state: str | None,
    limit: int,
    after: str | None,
    wanted: str | None,
    wants_json: bool,
) -> int:
    """Print messages in their order and change nothing.

    A table on a terminal, and JSON lines elsewhere. The exit code is 1 when there is none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url, name) as broker:
        if wanted is None:
            found = broker.peek(name, state=state or State.READY, limit=limit, after=after)
            none = f"no {state or 'ready'} messages"
        else:
            found = _of_id(broker, name, wanted, state)
            none = f"no {state + ' ' if state else ''}message {wanted!r}"
        now = _now(broker)
    shown_state = State(state or State.READY)
    return _shown(found, shown_state, name, none, now=now, wants_json=wants_json, whole=wanted is not None)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--limit", type=_page, default=100, metavar="N", help="At most so many, up to 10000. Default 100.")
@click.option("--after", metavar="ID", help="Go on behind this message, the last one of the page before.")
@click.option("--id", "wanted", metavar="ID", help="Tell all of this one.")
@click.option("--reason", type=click.Choice(REASONS), help="Only those that died of it.")
@click.option("--error", metavar="TEXT", help="Only those whose last error holds this text, in whatever case.")
@click.option("--older", type=float, metavar="SECONDS", help="Only those that died longer ago.")
@click.option("--younger", type=float, metavar="SECONDS", help="Only those that died less long ago.")
@_json_option
def dead(
    *,
    arguments: tuple[str, ...],
    limit: int,
    after: str | None,
    wanted: str | None,
    reason: str | None,
    error: str | None,
    older: float | None,
    younger: float | None,
    wants_json: bool,
) -> int:
    """Print dead letters with their reason, last error and history.

    A table on a terminal, and JSON lines elsewhere. The exit code is 1 when there is none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    given: list[tuple[object, _Choice]] = [
        (reason, lambda one: one.reason == reason),
        (error, lambda one: (error or "").casefold() in one.error.casefold()),
        (older, lambda one: (now - one.at).total_seconds() > (older or 0.0)),
        (younger, lambda one: (now - one.at).total_seconds() < (younger or 0.0)),
    ]
    choices = [choice for value, choice in given if value is not None]
    fits: _Choice = lambda one: all(choice(one) for choice in choices)  # noqa: E731  # short
    with broker_at(url, name) as broker:
        now = _now(broker)
        if wanted is not None:
            found = [one for one in _of_id(broker, name, wanted, State.DEAD) if fits(one)]
        elif choices:
            found = list(_search(broker, name, State.DEAD, fits, after=after, limit=limit))
        else:
            found = broker.dead_letters(name, limit=limit, after=after)
    such = "such " if choices else ""
    none = f"no {such}dead letters" if wanted is None else f"no {such}dead letter {wanted!r}"
    return _shown(found, State.DEAD, name, none, now=now, wants_json=wants_json, whole=wanted is not None)


def _now(broker: Broker) -> datetime:
    """Return the store's time, by which messages are old."""
    return call_on(broker, overview_of(door_of(broker)).now)


def _of_id(broker: Broker, name: str, message_id: str, state: str | None) -> list[StoredMessage]:
    """Return one message, in whatever state unless one is given; raise where the engine cannot look at those."""
    overview = overview_of(door_of(broker))
    found = call_on(broker, overview.find, name, message_id)
    if found is None and State(state or State.READY) not in overview.sees:
        broker.peek(name, state=state or State.READY)  # it says what cannot be seen
    return [found] if found is not None and state in (None, found.state.value) else []


def _search(
    broker: Broker, name: str, state: State, fits: _Choice, *, after: str | None, limit: int
) -> Iterator[StoredMessage]:
    """Yield up to `limit` messages that fit, page by page, each once.

    An id that its sender has given names no place once its message has left: the search begins again then.
    """
    behind, seen, begun_again = after, set[str](), 0
    for _ in range(SEARCHED_MAX // _SEARCHED_AT_ONCE):
        try:
            page = broker.peek(name, state=state, limit=_SEARCHED_AT_ONCE, after=behind)
        except ConfigurationError:
            begun_again += 1
            if behind == after or begun_again > _BEGUN_AGAIN_MAX:
                raise
            behind = after
            continue
        fitting = [message for message in page if message.id not in seen and fits(message)][:limit]
        seen |= {message.id for message in fitting} - {""}
        yield from fitting
        limit -= len(fitting)
        if limit <= 0 or len(page) < _SEARCHED_AT_ONCE:
            return
        behind = page[-1].id
    note(f"no more than {SEARCHED_MAX:,} messages were searched; go on with --after {behind}")


def _shown(
    messages: Sequence[StoredMessage],
    state: State,
    name: str,
    none: str,
    *,
    now: datetime,
    wants_json: bool,
    whole: bool,
) -> int:
    """Print or draw messages, the only one as a `whole`; where there are none, say that the queue has `none`."""
    if not messages:
        note(f"queue {name!r} has {none}")
        return 1
    if wants_json or not is_terminal(sys.stdout):
        print_lines(
            as_json({**msgspec.structs.asdict(message), **shown_body(message.body), "error": message.error})
            for message in messages
        )
    elif whole:
        tell(messages[0], now)
    else:
        draw_stored(messages, state, now)
    return 0


def _each_once(_context: click.Context, _parameter: click.Parameter, ids: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ids))


_ids_option = click.option(
    "--id", "ids", multiple=True, metavar="ID", callback=_each_once, help="Only this one. May be repeated."
)
_reason_option = click.option("--reason", type=click.Choice(REASONS), help="Only those that died of it.")
_kind_option = click.option(
    "--kind",
    metavar="TEXT",
    help="Only those whose last error is of this kind, as the dashboard groups them: ValueError.",
)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@_ids_option
@_reason_option
@_kind_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only so many, the oldest first.")
@click.option("--rate", type=Number(0.01, 10_000), metavar="N", help="At most so many per second.")
@click.option("--body", metavar="JSON", help="Replace the body of the one --id.")
def redrive(
    *,
    arguments: tuple[str, ...],
    ids: tuple[str, ...],
    reason: str | None,
    kind: str | None,
    limit: int | None,
    rate: float | None,
    body: str | None,
) -> int:
    """Send dead letters back to their old places.

    All of them, unless --id, --reason, --kind or --limit chooses; their attempts begin anew. Prints {"redriven": N}.
    The exit code is 1 when there was none, or when an --id names none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    if body is not None and len(ids) != 1:
        raise usage("--body is the new body of one dead letter: give its --id, once")
    new = msgspec.UNSET if body is None else json_text(os.fsencode(body))
    with broker_at(url, name) as broker:
        if rate is None and reason is None and kind is None:
            count = broker.redrive(name, ids=ids or None, limit=limit, body=new)
        else:
            chosen = ids or _of_kind(broker, name, reason, kind, limit)
            count = _in_slices(
                chosen, rate, lambda some: broker.redrive(name, ids=some, limit=None if ids else len(some), body=new)
            )
    print_lines([as_json({"redriven": count})])
    return _said(name, ids, count, limit)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@_ids_option
@_reason_option
@_kind_option
@click.option("--yes", is_flag=True, help="Do not ask; required where there is no terminal to ask on.")
def discard(
    *, arguments: tuple[str, ...], ids: tuple[str, ...], reason: str | None, kind: str | None, yes: bool
) -> int:
    """Delete dead letters for good, by --id, --reason or --kind.

    All of a queue: filao purge --state dead. Prints {"discarded": N}. It asks first; when the answer is no, the exit
    code is 1, as it is when there was none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    if not ids and reason is None and kind is None:
        raise usage("give --id, --reason or --kind; all dead letters of a queue: filao purge --state dead")
    with broker_at(url, name) as broker:
        chosen = ids or _of_kind(broker, name, reason, kind, None)
        if not yes and not confirmed("discard", f"Delete {some(len(chosen), 'dead letter')} of queue {name!r}?"):
            note("nothing was deleted")
            return 1
        count = _in_slices(chosen, None, lambda some: broker.discard(name, ids=some))
    print_lines([as_json({"discarded": count})])
    return _said(name, ids, count, None)


def _of_kind(broker: Broker, name: str, reason: str | None, kind: str | None, limit: int | None) -> Sequence[str]:
    """Return the ids of the dead letters of a reason and a kind, the oldest first."""

    def fits(one: StoredMessage) -> bool:
        return (reason is None or one.reason == reason) and (kind is None or error_kind(one.error) == kind)

    return [one.id for one in _search(broker, name, State.DEAD, fits, after=None, limit=limit or SEARCHED_MAX)]


def _in_slices(ids: Sequence[str], rate: float | None, work: Callable[[Sequence[str]], int]) -> int:
    """Work on messages in slices, at most `rate` of them per second, even after a slice that took long."""
    size = _SEARCHED_AT_ONCE if rate is None else max(1, min(_SEARCHED_AT_ONCE, round(rate / 5)))
    due = time.monotonic()
    with Tally() as tally:
        try:
            for first in range(0, len(ids), size):
                tally.done += work(ids[first : first + size])
                if rate is not None and first + size < len(ids):
                    due = max(due + size / rate, time.monotonic())
                    time.sleep(max(0.0, due - time.monotonic()))
        except (KeyboardInterrupt, SystemExit):
            are_done = some(tally.done, "message", ("is done", "are done"))
            note(f"{are_done}, of {len(ids):,}; what was under way when this was interrupted may be, too")
            raise
    return tally.done


def _said(name: str, ids: Sequence[str], count: int, limit: int | None) -> int:
    """Return the exit code; note when an id names no dead letter, or there was none."""
    wanted = min(len(ids), limit or len(ids)) if ids else 1
    if count >= wanted:
        return 0
    if len(ids) > 1:
        are = "is" if wanted - count == 1 else "are"
        note(f"{wanted - count} of {wanted} ids {are} of no dead letter of queue {name!r}")
    else:
        note(f"queue {name!r} has no dead letter {ids[0]!r}" if ids else f"queue {name!r} has no such dead letters")
    return 1


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option(
    "--state", type=_state, help="Only what is in this state. Default: all that waits (ready, delayed, blocked)."
)
@click.option("--yes", is_flag=True, help="Do not ask; required where there is no terminal to ask on.")
def purge(*, arguments: tuple[str, ...], state: str | None, yes: bool) -> int:
    """Delete the messages that wait, or those in one state.

    Prints {"purged": N}. It asks first; when the answer is no, the exit code is 1.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url, name) as broker:
        stats = broker.stats(name)
        if not yes and not confirmed("purge", f"Delete {_counted(stats, state)} of queue {name!r}?"):
            note("nothing was deleted")
            return 1
        print_lines([as_json({"purged": broker.purge(name, state=state)})])
    return 0


def _counted(stats: QueueStats, state: str | None) -> str:
    if state is not None:
        return some(getattr(stats, state), f"{state} message")
    return some(stats.ready + stats.delayed + stats.blocked, "waiting message")
