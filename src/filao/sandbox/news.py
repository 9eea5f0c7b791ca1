"""What the processes of a room have written into their journals since the last look, and who learns of it."""

from collections.abc import Iterable

from filao.sandbox import journal
from filao.sandbox.customers import Customers
from filao.sandbox.effects import Effects
from filao.sandbox.journal import Record, Tail
from filao.sandbox.lanes import Lanes


class News:
    """Reads journals, and keeps what those of the portal and the printer say."""

    def __init__(self, customers: Customers, lanes: Lanes, effects: Effects) -> None:
        self.answer_ms: float | None = None
        """How many milliseconds the portal took to answer the last customer; None before the first."""
        self.refused: int = 0
        """Claims that the queue did not take."""
        self.letters: list[int] = []
        """Claims for which a letter was written."""
        self.printing: int = 0
        """The claim whose letter is being written."""
        self._customers = customers
        self._lanes = lanes
        self._effects = effects

    def read(self, journals: Iterable[Tail]) -> None:
        """Read what is new, in the order in which it happened."""
        news = [record for tail in journals for record in tail.read()]
        for record in sorted(news, key=lambda record: record.at):
            match record.who:
                case journal.PORTAL:
                    self._of_portal(record)
                case journal.PRINTER:
                    self.printing = record.claim if record.what == "received" else 0
                    if record.what == "handled" and record.claim not in self.letters:
                        self.letters.append(record.claim)
                case _:
                    self._lanes.feed(record)

    def _of_portal(self, record: Record) -> None:
        if record.what == "sent":
            self._effects.sent(record.message, record.claim, record.at)
            self.answer_ms = float(record.note)
            self._lanes.move(record)
        elif record.what == "unsent":
            self.refused += 1
            self._customers.take_back(record.claim)
            self._lanes.tell(record.at, "unsent", claim=record.claim, why=record.note)
