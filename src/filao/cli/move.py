"""`filao move`: from one engine to another."""

import asyncio
import shlex
import sys
from collections.abc import Mapping

import click
import msgspec

from filao.cli.shell import as_json, check_file, file_of, is_terminal, note, print_lines
from filao.cli.tables import draw
from filao.engines import engine_for
from filao.moving import Movable, Moved, move, plan
from filao.printable import printable, some
from filao.urls import shown_url

_FIELDS = msgspec.structs.fields(Moved)
_STAND_IN = "sqlite://:memory:"
"""What a dry run looks at in place of a file that is not there: it makes none."""


@click.command(name="move")
@click.argument("source")
@click.argument("target")
@click.option("--queue", "queues", multiple=True, metavar="QUEUE", help="Only this queue. May be repeated.")
@click.option("--dry-run", is_flag=True, help="Say what there is to move and whether the target can keep it.")
def move_command(*, source: str, target: str, queues: tuple[str, ...], dry_run: bool) -> int:
    """Carry queues from one engine to another.

    Waiting messages, delays, groups, dead letters and deduplication keys go from the URL SOURCE to the URL TARGET.
    Stop the consumers of the source first: what they hold stays. Whatever ends this command, run it again: it goes on
    where it was. The exit code is 1 when messages stay: consumers hold them, or they are delayed on RabbitMQ.
    """
    check_file(source)
    moved = asyncio.run(_run(source, target, queues, dry_run=dry_run))
    if is_terminal(sys.stdout):
        rows = [tuple(str(value) for value in msgspec.structs.astuple(queue)) for queue in moved]
        draw([field.name for field in _FIELDS], rows, figures=True)
    else:
        print_lines(as_json(queue) for queue in moved)
    held = sum(queue.held for queue in moved)
    if held:
        note(
            f"{some(held, 'message')} left at {shown_url(source)}, held by consumers or waiting on a ladder of delays. "
            f"Move again once they are done"
        )
    return 1 if held else 0


async def _run(source: str, target: str, queues: tuple[str, ...], *, dry_run: bool) -> list[Moved]:
    file = file_of(target)
    is_new = file is not None and not file.exists()
    here, there = engine_for(source), engine_for(_STAND_IN if dry_run and is_new else target)
    await here.open()
    try:
        await there.open()
        try:
            planned = await plan(here, there, queues)
            if dry_run:
                return planned
            begun: list[str] = []
            try:
                return await _watched(here, there, queues, planned, begun)
            except BaseException:
                ends = {shown_url(url): engine for url, engine in ((source, here), (target, there))}
                _note_paused(begun[-1:], ends)
                raise
        finally:
            await there.close()
    finally:
        await here.close()


def _note_paused(queues: list[str], ends: Mapping[str, Movable]) -> None:
    """Say that the queue whose move was interrupted may be left paused, and what lets it go on."""
    pausing = [url for url, engine in ends.items() if engine.operators.pausing is not None]
    for name in queues:
        resumed = "; ".join(shlex.join(["filao", "resume", url, name]) for url in pausing)
        if resumed:
            note(
                f"queue {name!r} may be left paused at {' and '.join(pausing)}: move again, which goes on where it "
                f"was. To give it up: {resumed} (what has moved stays at the target)"
            )


async def _watched(
    here: Movable, there: Movable, queues: tuple[str, ...], planned: list[Moved], begun: list[str]
) -> list[Moved]:
    """Move the queues, add each to `begun`, and draw on the terminal how far that has come."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not is_terminal(sys.stderr)) as progress:
        tasks = {
            queue.queue: progress.add_task(escape(printable(queue.queue)), total=queue.waiting + queue.dead)
            for queue in planned
        }

        def on_moved(moved: Moved) -> None:
            if moved.queue not in begun:
                begun.append(moved.queue)
            progress.update(tasks[moved.queue], completed=moved.waiting + moved.dead)

        return await move(here, there, queues, on_moved)
