"""`filao receive`: take messages off a queue, print them, and only then acknowledge them."""

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from filao.cli.shell import Number, addressed, as_json, broker_at, is_terminal, note, print_lines, shown_body, usage
from filao.engine import Feature
from filao.errors import LeaseLost
from filao.printable import printable
from filao.sync import Broker, Message, call_on, inner_of

PREFETCH = 100  # messages leased at once: their acks share a flush of the disk
SLOW_AFTER = 0.5  # seconds of a slow reader after which what it has not yet taken goes back to the queue


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many messages. Default 1.")
@click.option("--all", "everything", is_flag=True, help="Until the queue has nothing ready.")
@click.option("--wait", type=Number(min=0), metavar="SECONDS", help="Wait so long whenever there is none. Default 0.")
@click.option("--follow", is_flag=True, help="Wait for ever for the next one; without --limit, never end.")
@click.option(
    "--raw", is_flag=True, help="Print bodies only: JSON as a line, bytes untouched (but on a terminal) and a newline."
)
@click.option("--at-most-once", is_flag=True, help="Delete each message before it is printed, not after.")
def receive(
    *,
    arguments: tuple[str, ...],
    limit: int | None,
    everything: bool,
    wait: float | None,
    follow: bool,
    raw: bool,
    at_most_once: bool,
) -> int:
    """Take messages off a queue and print them.

    Each is printed as a JSON line, with id, body, headers, attempt, group and priority; a body of bytes is printed as
    {"base64": ...}, with "bytes": true beside it.

    A message is acknowledged, and so deleted, once its line was written to stdout: at least once. If this command is
    killed in between, or stdout is closed, the message is received again. With --at-most-once it is deleted first, and
    lost if it cannot be written. Whatever a reader has taken from the pipe and not dealt with is its own: before
    "head -n 3" prefer --limit 3.

    The exit code is 0 when a message was received, and 1 when there was none.
    """
    if everything and limit:
        raise usage("--all and --limit contradict each other: give one")
    if follow and wait is not None:
        raise usage("--follow waits for ever: give it or --wait")
    url, (name,) = addressed(arguments, least=1, most=1)
    left = limit or (sys.maxsize if everything or follow else 1)
    received = 0
    with broker_at(url, name) as broker:
        while received < left:
            taken = broker.receive_many(
                name,
                1 if at_most_once else min(PREFETCH, left - received),
                wait=None if follow else wait or 0,
                guarantee="at-most-once" if at_most_once else "at-least-once",
            )
            if not taken:
                break
            received += _hand_over(broker, taken, raw=raw)
        if not received and Feature.PAUSE in broker.features and broker.stats(name).paused:
            note(f"queue {name!r} is paused: filao resume lets its deliveries go on")
    return 0 if received else 1


def _hand_over(broker: Broker, messages: Sequence[Message[Any]], *, raw: bool) -> int:
    """Print and acknowledge messages, give back what a slow reader left or was not printed; return how many were."""
    started, printed = time.monotonic(), 0
    try:
        for message in messages:
            print_lines([_body_alone(message.body) if raw else as_json(_received(message))])
            printed += 1
            if time.monotonic() - started > SLOW_AFTER:
                break
    finally:
        call_on(broker, _settle, messages[:printed], messages[printed:])
    return printed


async def _settle(printed: Sequence[Message[Any]], unread: Sequence[Message[Any]]) -> None:
    """Ack and release together, in one flush of the disk, and note the messages whose leases were lost."""
    acks = [inner_of(message).ack() for message in printed]
    releases = [inner_of(message).release() for message in unread if not message.settled]
    for outcome in await asyncio.gather(*acks, *releases, return_exceptions=True):
        if isinstance(outcome, LeaseLost):
            note(f"the reader was slower than the lease: {outcome}")
        elif outcome is not None:
            raise outcome


def _received(message: Message[Any]) -> dict[str, object]:
    return {
        "id": message.id,
        "queue": message.queue,
        **shown_body(message.body),
        "headers": message.headers,
        "attempt": message.attempt,
        "group": message.group,
        "priority": message.priority,
        "sent_at": message.sent_at,
    }


def _body_alone(body: object) -> bytes:
    if not isinstance(body, bytes):
        return as_json(body)
    return printable(body.decode(errors="backslashreplace")).encode() if is_terminal(sys.stdout) else body
