"""The HTTP health check of `filao work --health`: 200 while all is well, 503 while it is not, with the reasons as JSON.

`/ready` asks only whether the workers receive; every other path asks whether they are healthy.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import msgspec

from filao.cli.pages import Page, served

State = Callable[[], Mapping[str, object]]


@contextmanager
def health_check(host: str, port: int, state: State) -> Generator[int]:
    """Serve `state`, of which "ready" and "healthy" decide; yield the port, which port 0 lets the system choose."""

    async def answer(path: bytes) -> Page:
        now = state()
        is_well = now["ready" if path == b"/ready" else "healthy"]
        return Page(msgspec.json.encode(now), status=b"200 OK" if is_well else b"503 Service Unavailable")

    with served("--health", host, port, answer, name="filao health") as listening:
        yield listening
