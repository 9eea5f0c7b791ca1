"""The contract on a real server: all checks at once, in queues of their own, in real time; and what came of it."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import msgspec

from filao.broker import Broker
from filao.conformance.stage import Check, Stage, checks, needed_by
from filao.engine import Feature
from filao.errors import FilaoError

AT_ONCE = 12  # checks; each may hold three brokers
CHECKED_WITHIN = 180.0  # seconds for one check
SLACK = 0.7  # seconds that a server may be late, and that we may

Connect = Callable[[], AbstractAsyncContextManager[Broker]]


class Verdict(msgspec.Struct, frozen=True):
    """What came of one check."""

    check: str
    """What it says, as words."""
    features: tuple[Feature, ...]
    """What it is about; none: what every engine must do."""
    error: str
    """Empty when it passed."""


async def verify(connect: Connect, on_verdict: Callable[[Verdict], None] = lambda _: None) -> list[Verdict]:
    """Run every check that the engine must pass, tell each verdict as it comes, and return them all.

    The queues are named `filao-verify-…` and are deleted at the end, however it ends. The clock is the server's, so it
    takes about a minute. Raises the `FilaoError` of a server that cannot be reached at all.
    """
    async with connect() as broker:
        features = broker.features | broker.emulated
    run = f"filao-verify-{secrets.token_hex(4)}"
    places = asyncio.Semaphore(AT_ONCE)

    async def judge(number: int, check: Check) -> Verdict:
        async with places:
            verdict = await _judge(connect, f"{run}.{number}", check)
        on_verdict(verdict)
        return verdict

    return await asyncio.gather(*(judge(number, check) for number, check in enumerate(checks(features))))


async def _judge(connect: Connect, prefix: str, check: Check) -> Verdict:
    error = ""
    try:
        async with asyncio.timeout(CHECKED_WITHIN), _stage(connect, prefix) as stage:
            await check(stage)
    except TimeoutError:
        error = f"it has not ended within {CHECKED_WITHIN:g} s"
    except (FilaoError, AssertionError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    words = check.__name__.removeprefix("check_").replace("_", " ")
    return Verdict(words, tuple(sorted(needed_by(check))), error)


@asynccontextmanager
async def _stage(connect: Connect, prefix: str) -> AsyncGenerator[Stage]:
    """Set the stage, and leave nothing of it behind."""
    async with connect() as broker:
        stage = Stage(broker, asyncio.sleep, connect, prefix=prefix, slack=SLACK)
        try:
            yield stage
        finally:
            for queue in stage.declared:
                with suppress(FilaoError):  # the check itself may have deleted it
                    await broker.delete_queue(queue, messages=True)
