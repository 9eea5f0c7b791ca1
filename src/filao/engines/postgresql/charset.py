"""Which text a database can hold: bodies are stored as bytes, but keys, headers and errors are text."""

import codecs

from filao.codec import shown
from filao.engine import Draft
from filao.errors import MessageNotEncodable


class Charset:
    """Which text a database can hold, by the name of its encoding."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._codec = codecs.lookup("utf-8" if name == "SQL_ASCII" else name.replace("WIN", "cp", 1)).name
        except LookupError:
            self._codec = "ascii"  # Python does not know the encoding, but all have ASCII in common

    @property
    def is_full(self) -> bool:
        """Whether it can hold any text."""
        return self._codec == "utf-8"

    def check(self, queue: str, draft: Draft) -> None:
        """Raise `MessageNotEncodable` for text that it cannot hold; a body is stored as bytes."""
        for what in ("headers", "group", "dedup_key", "message_id"):
            if not self.fits(getattr(draft, what)):
                raise MessageNotEncodable(
                    f"queue {queue!r}: {what} is {shown(getattr(draft, what))}, and the database's encoding, "
                    f"{self.name}, cannot hold it. Nothing was sent. Put it into the body, or use a database with the "
                    "encoding UTF8."
                )

    def fits(self, text: str | None) -> bool:
        """Return whether it can hold a text."""
        try:
            (text or "").encode(self._codec)
        except UnicodeEncodeError:
            return False
        return True

    def fitted(self, text: str) -> str:
        """Return a text in which all that it cannot hold is escaped; for errors, which must not get lost."""
        return text.replace("\0", "\\0").encode(self._codec, "backslashreplace").decode(self._codec)
