"""`filao metrics`: a store's metrics for Prometheus, and the alert rules and the dashboard that go with them."""

import asyncio
import logging
import threading
from importlib import resources
from typing import TYPE_CHECKING

import click

from filao.cli.pages import ANSWERS_WITHIN, Page, address_of, served, shown_address
from filao.cli.shell import addressed, broker_at, file_of, note, print_lines, read_anew, safe

if TYPE_CHECKING:
    from filao.prometheus.store import StoreCollector

log: logging.Logger = logging.getLogger("filao.metrics")

TEXT = b"text/plain; version=0.0.4; charset=utf-8"  # the content type of Prometheus' text format
READ_WITHIN = ANSWERS_WITHIN - 1.0  # seconds for reading the store, after which a scrape is told that it is not up
_NOT_UP = b"# TYPE filao_store_up gauge\nfilao_store_up 0.0\n"


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL]")
@click.option("--listen", metavar="[HOST:]PORT", help="Serve /metrics until Ctrl-C, on loopback unless HOST is given.")
@click.option("--queue", "only", multiple=True, metavar="NAME", help="Only these queues; * stands for anything.")
@click.option(
    "--queues-max", type=click.IntRange(1, 100_000), default=500, show_default=True, help="How many are told."
)
@click.option("--rules", is_flag=True, help="Print alert rules for Prometheus.")
@click.option("--grafana", is_flag=True, help="Print a dashboard for Grafana.")
def metrics(
    *,
    arguments: tuple[str, ...],
    listen: str | None,
    only: tuple[str, ...],
    queues_max: int,
    rules: bool,
    grafana: bool,
) -> int:
    """Print the figures of a store for Prometheus, or serve them.

    They are read from the store itself: depth and totals are right with no worker alive, and counted once. It needs
    pip install 'filao[prometheus]'; --rules and --grafana need neither that nor a URL. What a worker measures is served
    by filao work --metrics.
    """
    if rules or grafana:
        folder = resources.files("filao") / "prometheus"  # to import filao.prometheus takes the extra
        names = [name for name, is_wanted in (("rules.yml", rules), ("grafana.json", grafana)) if is_wanted]
        print_lines(folder.joinpath(name).read_bytes().rstrip() for name in names)
        return 0
    url, _ = addressed(arguments, least=0, most=0)
    from filao.prometheus.store import Figures, StoreCollector, exposition

    with broker_at(url) as broker:
        file, features = file_of(url), broker.features

        def read() -> Figures:
            return Figures(read_anew(broker, broker.stats), features, file)

        collector = StoreCollector(read, only=only, most=queues_max)
        if listen is not None:
            return _serve(collector, *address_of("--listen", listen))
        text, error = exposition(collector)
        if error is not None:
            raise error
        print_lines([text.rstrip()])
    return 0


def _serve(collector: "StoreCollector", host: str, port: int) -> int:
    """Serve until interrupted."""
    scraper = Scraper(collector)
    with served("--listen", host, port, scraper.answer, name="filao metrics") as listening:
        note(f"metrics at {shown_address(host, listening)}metrics")
        threading.Event().wait()
    return 0


class Scraper:
    """Answers scrapes; those that come while the store is being read share its answer.

    Where a reading takes longer than a scrape may, as with thousands of queues on a busy machine, the next scrape gets
    it, once: else a store that answers would be told not to be up for ever, and one that does not would be told to be.
    """

    def __init__(self, collector: "StoreCollector") -> None:
        self._collector = collector
        self._reading: asyncio.Task[bytes] | None = None
        self._late = b""
        """What came too late for its scrape; empty: nothing did, or it was told."""
        self._has_failed = False

    async def answer(self, path: bytes) -> Page:
        """Return the metrics, or that the store is not up if it does not answer in time."""
        if path not in (b"/metrics", b"/"):
            return Page(b"see /metrics\n", b"text/plain", b"404 Not Found")
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        reading = self._reading
        done, _ = await asyncio.wait([reading], timeout=READ_WITHIN)
        late, self._late = self._late, b""
        if done:
            return Page(reading.result(), TEXT)
        reading.add_done_callback(self._came_late)
        return Page(late or _NOT_UP, TEXT)

    def _came_late(self, reading: "asyncio.Task[bytes]") -> None:
        if not reading.cancelled():
            self._late = reading.result()

    def _read(self) -> bytes:
        from filao.prometheus.store import exposition

        text, error = exposition(self._collector)
        if error is not None and not self._has_failed:
            note(safe(f"the store cannot be read: {error}"))
        elif error is None and self._has_failed:
            note("the store can be read again")
        self._has_failed = error is not None
        return text
