"""`filao declare`: create a queue, or change some rules of one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click
import msgspec

from filao.cli.shell import addressed, as_json, broker_at, print_lines
from filao.queue import EMULATED, Backoff, Queue, rules_to_json

R = TypeVar("R")


def _seconds_or_none(text: str) -> float | str:
    """Read a rule that can be "none"; leaving the option out cannot mean that, because it keeps the stored rule."""
    return _or_none(text, float)


def _count_or_none(text: str) -> int | str:
    return _or_none(text, int)


def _or_none(text: str, number: Callable[[str], R]) -> R | str:
    try:
        return text if text == "none" else number(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor the word none") from None


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--lease", type=float, metavar="SECONDS", help="How long a consumer may hold a message. Default 30.")
@click.option("--max-attempts", type=int, metavar="N", help="Failed attempts that make a dead letter. Default 5.")
@click.option(
    "--ttl", type=_seconds_or_none, metavar="SECONDS|none", help="Age at which messages expire. Default none."
)
@click.option("--on-expiry", type=click.Choice(["dead", "drop"]), help="What expires: a dead letter, or nothing.")
@click.option("--dedup-window", type=float, metavar="SECONDS", help="Keys are remembered for so long. Default 300.")
@click.option("--max-length", type=_count_or_none, metavar="N|none", help="Messages that may wait. Default none.")
@click.option("--overflow", type=click.Choice(["refuse", "drop_oldest"]), help="What happens at the maximal length.")
@click.option("--group-failure", type=click.Choice(["block", "skip"]), help="A failing head: its group waits, or not.")
@click.option(
    "--group-dead", type=click.Choice(["continue", "halt"]), help="A head that died: its group goes on, or not."
)
@click.option("--body-max", type=int, metavar="BYTES", help="The largest body. Default 262144 (256 KiB).")
@click.option("--history/--no-history", default=None, help="Write each event down, for filao trace. Default no.")
@click.option("--history-window", type=float, metavar="SECONDS", help="Events are kept for so long. Default 604800.")
@click.option("--emulate", type=click.Choice(EMULATED), multiple=True, help="What RabbitMQ may imitate: delay.")
@click.option("--backoff-first", type=float, metavar="SECONDS", help="Delay after a first failure. Default 1.")
@click.option("--backoff-factor", type=float, metavar="F", help="How it grows with each failure. Default 2.")
@click.option("--backoff-ceiling", type=float, metavar="SECONDS", help="The longest such delay. Default 300.")
@click.option("--backoff-jitter", type=float, metavar="SHARE", help="Its random share, 0 to 1. Default 0.5.")
def declare(*, arguments: tuple[str, ...], **given: object) -> None:
    """Create a queue, or change the rules of one.

    It creates the file, too, as no other command does but restore and move. Rules that are not given stay as they are,
    or have their defaults in a new queue. The rules are printed.
    """
    # The options are named as the rules are: naming them a third time here would be one place more to forget.
    url, (name,) = addressed(arguments, least=1, most=1)
    _with_rules(Queue(name), given)  # what is wrong in itself is refused before a file is created
    with broker_at(url, name, create=True) as broker:
        stored = {queue.name: queue for queue in broker.queues()}
        queue = _with_rules(stored.get(name, Queue(name)), given)
        broker.declare(queue)
    print_lines([as_json({"name": queue.name, **msgspec.json.decode(rules_to_json(queue))})])


def _with_rules(queue: Queue[Any], given: dict[str, object]) -> Queue[Any]:
    """Return the queue with the rules that the options gave."""
    rules: dict[str, Any] = {
        rule: None if value == "none" else value for rule, value in given.items() if value not in (None, ())
    }
    backoff = {rule: rules.pop(f"backoff_{rule}") for rule in Backoff.__slots__ if f"backoff_{rule}" in rules}
    return replace(queue, backoff=replace(queue.backoff, **backoff), **rules)
