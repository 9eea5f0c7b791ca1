"""The counter-proof: change a line of a journal before the ledger is drawn up, and see it fail."""

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from filao.sandbox.journal import KILLS, Record, Tail


def tamper(folder: Path, how: str) -> None:
    """Change what a worker that lives wrote, as if the queue had broken its promise in this way."""
    killed = {record.who for record in Tail(folder / KILLS).read()}
    for path in sorted(folder.glob("worker-*.journal")):
        records = Tail(path).read()
        alive = (record for record in records if record.who not in killed)
        acked = next((record for record in alive if record.what == "acked" and record.attempt == 1), None)
        if acked is not None:
            changed = TAMPERINGS[how](records, acked)
            path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in changed))
            return


def _lose(records: list[Record], acked: Record) -> Iterable[Record]:
    """As if a claim had been confirmed, and nobody had ever seen it."""
    return [record for record in records if record.message != acked.message]


def _double(records: list[Record], acked: Record) -> Iterable[Record]:
    """As if a claim that was handled and acked had been delivered again."""
    again = ("received", "handled", "acked")
    return [*records, *(msgspec.structs.replace(acked, what=what, attempt=2) for what in again)]


def _forget(records: list[Record], acked: Record) -> Iterable[Record]:
    """As if the engine had deleted a claim that nobody had acked."""
    return [record for record in records if record != acked]


TAMPERINGS: dict[str, Callable[[list[Record], Record], Iterable[Record]]] = {
    "lose": _lose,
    "double": _double,
    "forget": _forget,
}
