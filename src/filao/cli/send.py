"""`filao send`: one message from the arguments, or one from every line of an input."""

import os
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, BinaryIO

import click

from filao.checks import check_name
from filao.cli.lines import Reader, reader, slices
from filao.cli.shell import addressed, as_json, broker_at, is_terminal, note, print_lines, standard_input, usage
from filao.draft import Outgoing
from filao.printable import some
from filao.queue import Queue, not_found
from filao.sync import Broker


def _header_pairs(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair!r} has no '='; give NAME=VALUE", ctx, param)
    return dict(pair.split("=", 1) for pair in pairs)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE [BODY]")
@click.option("--file", "source", type=click.File("rb"), help="Read the lines from a file instead of stdin.")
@click.option("--raw", is_flag=True, help="BODY, or each line, is sent as bytes, untouched.")
@click.option("--messages", is_flag=True, help="Each line is a whole message, as receive and peek print it.")
@click.option("--quiet", is_flag=True, help="Print one summary in place of a receipt for each message.")
@click.option(
    "--header", "headers", multiple=True, callback=_header_pairs, metavar="NAME=VALUE", help="May be repeated."
)
@click.option("--group", metavar="KEY", help="Messages of one group are handled one at a time, in order.")
@click.option("--delay", type=float, default=0.0, metavar="SECONDS", help="Deliver it only after so long.")
@click.option("--priority", type=int, default=0, metavar="N", help="Higher goes first. Default 0.")
@click.option("--ttl", type=float, metavar="SECONDS", help="Expire after so long. Default: the queue's rule.")
@click.option("--dedup-key", metavar="KEY", help="With BODY: send nothing if the key is remembered.")
@click.option("--message-id", metavar="ID", help="With BODY: choose the id; sent again, it is stored once.")
def send(
    *,
    arguments: tuple[str, ...],
    source: BinaryIO | None,
    raw: bool,
    messages: bool,
    quiet: bool,
    headers: dict[str, str],
    group: str | None,
    delay: float,
    priority: int,
    ttl: float | None,
    dedup_key: str | None,
    message_id: str | None,
) -> None:
    """Send BODY, a JSON text; or each line of stdin, or of a file.

    For each message a receipt is printed once it is durable: {"id": ..., "duplicate": ...}. When a file is loaded on a
    terminal, a progress bar and a summary take their place.

    Lines are sent as they come, up to 1,000 at a time, which are stored all or none. The first bad line ends it: all
    that stood before it is stored, nothing after it, and its number is told on stderr.

    With --messages a line is such as {"body": ..., "headers": {...}, "group": ..., "priority": ..., "delay": ...,
    "ttl": ..., "dedup_key": ..., "message_id": ...}; only body must be there, and the options hold for what it does not
    say. Thus messages are moved: filao receive a.db q --all | filao send b.db q --messages
    """
    url, (name, *body) = addressed(arguments, least=1, most=2)
    if body and (source or messages):
        raise usage("BODY is the message: give it, or --file, or --messages")
    if raw and messages:
        raise usage("--raw and --messages are two ways to read a line: give one")
    if not body and (dedup_key or message_id):
        raise usage("--dedup-key and --message-id belong to one message: give BODY, or put them in lines of --messages")
    terms: Outgoing[Any] = Outgoing(
        b"",
        headers=headers,
        group=group,
        delay=delay,
        priority=priority,
        ttl=ttl,
        dedup_key=dedup_key,
        message_id=message_id,
    )
    with broker_at(url, name) as broker:
        queue = _declared(broker, name)
        read = reader(queue, terms, raw=raw, messages=messages)
        if body:
            (receipt,) = broker.send_many(queue, [read(os.fsencode(body[0]))])
            print_lines([_summary(1, int(receipt.duplicate)) if quiet else as_json(receipt)])
        else:
            _load(broker, queue, source or standard_input(), read, quiet=quiet, raw=raw)


def _declared(broker: Broker, name: str) -> Queue[Any]:
    """Return a queue with its stored rules, so that messages can be checked before they are sent."""
    queues = {queue.name: queue for queue in broker.queues()}
    if name not in queues:
        check_name(name)
        raise not_found(name, queues)
    return queues[name]


def _load(broker: Broker, queue: Queue[Any], stream: BinaryIO, read: Reader, *, quiet: bool, raw: bool) -> None:
    """Send every line of the input, and print receipts; when it must stop, say first how far it came."""
    size = _size(stream)
    quiet = quiet or (size is not None and is_terminal(sys.stdout))
    sent = duplicates = lines = 0
    try:
        if stream.isatty():
            note("reading lines from the terminal; Ctrl-D ends them")
        with _progress(size) as advance:
            for part in slices(stream, read, blank=raw):
                receipts = broker.send_many(queue, part.messages)
                sent, lines = sent + len(receipts), part.last_line
                duplicates += sum(receipt.duplicate for receipt in receipts)
                advance(part.last_byte, sent)
                if not quiet:
                    print_lines(as_json(receipt) for receipt in receipts)
    except BaseException:
        stored = f"stored {some(sent, 'message')}, lines 1 to {lines:,}; go on with those after it"
        note(stored if sent else "stored nothing")
        raise
    if quiet:
        print_lines([_summary(sent, duplicates)])


def _size(stream: BinaryIO) -> int | None:
    """Return the size of a file; None for a pipe or a terminal, of which nobody knows how much will come."""
    status = os.fstat(stream.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextmanager
def _progress(size: int | None) -> Generator[Callable[[int, int], None]]:
    """Draw how many bytes and messages of a file were sent, where somebody sees it."""
    if not size or not is_terminal(sys.stderr):
        yield lambda _bytes, _messages: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    count = TextColumn("{task.fields[sent]}")
    columns = (TextColumn("sending"), BarColumn(), TaskProgressColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=size, sent="")
        yield lambda position, sent: progress.update(task, completed=min(position, size), sent=some(sent, "message"))


def _summary(sent: int, duplicates: int) -> bytes:
    return as_json({"sent": sent, "duplicates": duplicates})
