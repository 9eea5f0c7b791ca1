"""Senders and consumers that go on whatever happens, and afterwards the account: nothing confirmed is lost or
doubled.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from itertools import count

import filao

QUEUE: filao.Queue = filao.Queue(
    "claims.processing", lease=5.0, max_attempts=1_000, backoff=filao.Backoff(first=0.01, ceiling=0.1)
)
AGAIN = 0.02  # seconds between two tries of the same
PROGRESS = 50  # messages sent, and as many acknowledged, which show that the work has resumed
TRANSACTED = 5  # of the messages that are sent in transactions, one after the other
GIVEN_BACK_WITHIN = 30.0  # seconds for a server to notice that a session has ended
RESUMES_WITHIN = 10.0  # seconds after the end of a fault: a promise


class Load:
    """What was asked, confirmed and worked on."""

    def __init__(self, *, named: bool = True, transacts: bool = False, queue: filao.Queue = QUEUE) -> None:
        self.confirmed: set[str] = set()
        self.handled: Counter[str] = Counter()
        """How often each message was delivered."""
        self.acked: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.transacted = 0
        """How many were sent in transactions."""
        self._named = named
        self._transacts = transacts
        self._queue = queue

    async def send(self, broker: filao.Broker, sender: str) -> None:
        """Send one message after another, each again and again until it is confirmed."""
        for number in count():
            key = f"{sender}.{number}"
            while True:
                try:
                    await broker.send_to_queue(self._queue, key, message_id=key if self._named else None)
                except filao.EngineError as error:
                    self.errors[type(error).__name__] += 1
                    await asyncio.sleep(AGAIN)
                else:
                    break
            self.confirmed.add(key)

    async def transact(self, broker: filao.Broker, sender: str) -> None:
        """Send as `send` does, each message in a transaction."""
        for number in count():
            key = f"{sender}.{number}"
            while True:
                try:
                    async with broker.transaction() as tx:
                        await tx.execute("SELECT 1")
                        await tx.send_to_queue(self._queue, key, message_id=key)
                except filao.EngineError as error:
                    self.errors[type(error).__name__] += 1
                    await asyncio.sleep(AGAIN)
                else:
                    break
            self.confirmed.add(key)
            self.transacted += 1
            await asyncio.sleep(AGAIN)  # others send enough

    async def consume(self, broker: filao.Broker) -> None:
        """Receive and acknowledge until cancelled."""
        while True:
            try:
                message = await broker.receive_from_queue(self._queue)
                self.handled[message.body] += 1
                await message.ack()
                self.acked[message.body] += 1
            except filao.EngineError as error:
                self.errors[type(error).__name__] += 1
                await asyncio.sleep(AGAIN)
            except filao.LeaseLost:
                self.errors["LeaseLost"] += 1

    async def resumes(self, within: float = RESUMES_WITHIN) -> None:
        """Wait until messages are being sent and consumed again."""
        sent, acked = len(self.confirmed) + PROGRESS, self.acked.total() + PROGRESS
        transacted = self.transacted + TRANSACTED if self._transacts else 0
        async with asyncio.timeout(within):
            while len(self.confirmed) < sent or self.acked.total() < acked or self.transacted < transacted:
                await asyncio.sleep(0.01)

    async def finish(self, broker: filao.Broker) -> None:
        """Handle what is left. What was confirmed and not delivered is waited for, before it counts as lost: RabbitMQ
        tells nobody of what it holds for a session whose end it has not noticed.
        """
        until = asyncio.get_running_loop().time() + GIVEN_BACK_WITHIN
        async with asyncio.timeout(2 * GIVEN_BACK_WITHIN):
            while True:
                try:
                    message = await broker.receive_from_queue(self._queue, wait=0.5)
                except filao.EngineUnavailable:
                    continue
                if message is not None:
                    self.handled[message.body] += 1
                    with suppress(filao.LeaseLost):
                        await message.ack()
                    continue
                stats = await broker.stats(self._queue)  # which takes RabbitMQ longer than a message
                is_late = asyncio.get_running_loop().time() > until
                if not stats.ready + stats.delayed + stats.leased + stats.blocked and (is_late or not self.lost):
                    return

    @property
    def lost(self) -> set[str]:
        """The messages that were confirmed and never delivered."""
        return self.confirmed - self.handled.keys()


@asynccontextmanager
async def loaded(
    senders: filao.Broker,
    consumers: filao.Broker,
    *,
    named: bool = True,
    transacts: bool = False,
    queue: filao.Queue = QUEUE,
) -> AsyncGenerator[Load]:
    """Keep senders and consumers busy in this block."""
    load = Load(named=named, transacts=transacts, queue=queue)
    tasks = [asyncio.create_task(load.send(senders, str(number))) for number in range(8)]
    tasks += [asyncio.create_task(load.consume(consumers)) for _ in range(8)]
    if transacts:
        tasks.append(asyncio.create_task(load.transact(senders, "transaction")))
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
