"""What is done in slices, each a transaction of its own: how far it came, also when it fails half-way."""

from types import TracebackType
from typing import Self

from filao.errors import FilaoError
from filao.printable import some


class Tally:
    """Counts the messages that are done; an error that follows tells of them, because its own text is of the rest."""

    def __init__(self) -> None:
        self.done: int = 0

    def __enter__(self) -> Self:
        """Begin to count."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise an error anew that comes half-way, as what it is."""
        if self.done and isinstance(error, FilaoError):
            are = "is" if self.done == 1 else "are"
            told = type(error)(f"{some(self.done, 'message')} {are} done, and will stay so. Of the rest: {error}")
            told.done = self.done
            raise told from error
