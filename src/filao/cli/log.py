"""`filao log`: who did what on the dashboard."""

import asyncio
from collections.abc import Sequence

import click
import msgspec

from filao.broker import connect, overview_of
from filao.cli.shell import addressed, as_json, broker_at, note, print_lines
from filao.errors import UnsupportedFeature
from filao.overview import DEEDS_KEPT, Deed


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL]")
@click.option(
    "--limit", type=click.IntRange(1, DEEDS_KEPT), default=100, show_default=True, metavar="N", help="At most so many."
)
def log(*, arguments: tuple[str, ...], limit: int) -> int:
    """Print what was done on the dashboard, the latest first.

    Each JSON line says who did what, when, and of how many. The last 10,000 entries are kept. The exit code is 1 when
    there is none.
    """
    url, _ = addressed(arguments, least=0, most=0)
    with broker_at(url):
        pass  # it says what is wrong with the URL
    deeds = asyncio.run(_deeds(url, limit))
    print_lines([as_json(msgspec.structs.asdict(deed)) for deed in deeds])
    if not deeds:
        note("nothing was done on the dashboard")
    return 0 if deeds else 1


async def _deeds(url: str, limit: int) -> Sequence[Deed]:
    async with connect(url) as broker:
        kept = overview_of(broker).log
        if kept is None:
            raise UnsupportedFeature(
                "RabbitMQ has no place for a log of what was done: the dashboard writes it into its own process's log. "
                "Engines that have: SQLite, PostgreSQL."
            )
        return await kept.deeds(limit)
