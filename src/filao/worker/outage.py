"""What fails for now: it is logged once, then rarely, and tried again after growing pauses, for as long as it takes."""

import logging
import random
import time
from collections.abc import Iterator

from filao.guarded import Log

log: Log = Log(logging.getLogger("filao.worker"))

RETRY_FIRST, RETRY_MAX = 0.1, 5.0  # seconds between tries while something fails
SAID_EVERY = 60.0  # seconds after which it is logged again that something still fails


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each next try, partly at random, so that not all come back at one moment."""
    pause = RETRY_FIRST
    while True:
        yield pause * random.uniform(0.5, 1.5)
        pause = min(2 * pause, RETRY_MAX)


class Outages:
    """What fails at present, each by a name such as "receiving"."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def fails(self, what: str, error: BaseException) -> None:
        """Log that something failed and will be tried again, unless that was logged lately."""
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        if now - self._said.get(what, -SAID_EVERY) < SAID_EVERY:
            return
        self._said[what] = now
        lasting = f" for {now - began:.0f} s" if now - began >= 1 else ""
        log.warning(
            "%s fails%s; trying again for as long as it takes: %s: %s", what, lasting, type(error).__name__, error
        )

    def is_over(self, what: str) -> None:
        """Log that something works again, if it had failed."""
        began = self._began.pop(what, None)
        if began is not None:
            self._said.pop(what, None)
            log.warning("%s works again, after %.1f s", what, time.monotonic() - began)
