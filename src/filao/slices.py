"""Work that is done in slices, each a transaction of its own: how far it came, even if it fails half-way."""

from types import TracebackType
from typing import Self

from filao.errors import FilaoError
from filao.printable import some


class Tally:
    """Counts the messages that are done, and tells their number in an error that comes half-way."""

    def __init__(self) -> None:
        self.done: int = 0

    def __enter__(self) -> Self:
        """Begin to count."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise an error that came half-way anew, of the same class, with the count before its text."""
        if self.done and isinstance(error, FilaoError):
            are_done = some(self.done, "message", ("is done", "are done"))
            told = type(error)(f"{are_done}, and will stay so. Of the rest: {error}")
            told.done = self.done
            raise told from error
