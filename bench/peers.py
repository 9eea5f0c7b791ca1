"""The systems that are measured, each behind the same few calls, each set to be durable when `send` returns.

`tasks` is how many concurrent callers each is at its best with: those that flush for every call gain nothing from
company, those that share flushes or round trips do.
"""

import asyncio
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

QUEUE = "bench"
IDLE = 0.005  # seconds between two looks of a peer that can only be polled


class Peer(Protocol):
    """One system, as a producer or a consumer uses it."""

    tasks: int

    async def open(self, place: str) -> None: ...
    async def send(self, body: bytes) -> None: ...
    async def receive(self, wait: float) -> tuple[bytes, Any] | None:
        """Return a body and what `ack` needs; None when there was nothing for `wait` seconds."""
        ...

    async def ack(self, handle: Any) -> None: ...
    async def close(self) -> None: ...


class Filao:
    tasks = 64

    async def open(self, place: str) -> None:
        import filao

        self.broker = filao.connect(Path(place) / "filao.db")
        await self.broker.open()
        await self.broker.declare(filao.Queue(QUEUE))

    async def send(self, body: bytes) -> None:
        await self.broker.send_to_queue(QUEUE, body)

    async def receive(self, wait: float) -> tuple[bytes, Any] | None:
        message = await self.broker.receive_from_queue(QUEUE, wait=wait)
        return None if message is None else (message.body, message)

    async def ack(self, handle: Any) -> None:
        await handle.ack()

    async def close(self) -> None:
        await self.broker.close()


class Polled:
    """What the embedded peers have in common: blocking calls, and nothing that wakes a consumer."""

    tasks = 1

    async def receive(self, wait: float) -> tuple[bytes, Any] | None:
        until = time.monotonic() + wait
        while (found := self._try_to_take()) is None and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(IDLE)
        return found

    def _try_to_take(self) -> tuple[bytes, Any] | None:
        """Take one, or nothing where the peer would die of a locked database."""
        try:
            return self.take()
        except sqlite3.OperationalError:
            return None

    def take(self) -> tuple[bytes, Any] | None:
        raise NotImplementedError

    async def ack(self, handle: Any) -> None:
        pass

    async def close(self) -> None:
        pass


class Huey(Polled):
    """huey's storage; it deletes as it hands out, so it has nothing to acknowledge."""

    async def open(self, place: str) -> None:
        from huey.storage import SqliteStorage

        self.storage = SqliteStorage(filename=f"{place}/huey.db", fsync=True)

    async def send(self, body: bytes) -> None:
        self.storage.enqueue(body)

    def take(self) -> tuple[bytes, Any] | None:
        body = self.storage.dequeue()
        return None if body is None else (bytes(body), None)


class Litequeue(Polled):
    async def open(self, place: str) -> None:
        from litequeue import LiteQueue

        connection = sqlite3.connect(f"{place}/lite.db", isolation_level=None, timeout=60, check_same_thread=False)
        self.queue = LiteQueue(connection)
        self.queue.conn.execute("PRAGMA synchronous = FULL")

    async def send(self, body: bytes) -> None:
        self.queue.put(body.decode("latin-1"))

    def take(self) -> tuple[bytes, Any] | None:
        message = self.queue.pop()
        return None if message is None else (message.data.encode("latin-1"), message.message_id)

    async def ack(self, handle: Any) -> None:
        self.queue.done(handle)


class PersistQueue(Polled):
    async def open(self, place: str) -> None:
        from persistqueue import SQLiteAckQueue

        self.queue = SQLiteAckQueue(f"{place}/persist", auto_commit=True, multithreading=True)

    async def send(self, body: bytes) -> None:
        self.queue.put(body)

    def take(self) -> tuple[bytes, Any] | None:
        from persistqueue.exceptions import Empty

        try:
            body = self.queue.get(block=False)
        except Empty:
            return None
        return body, body

    async def ack(self, handle: Any) -> None:
        self.queue.ack(handle)


class Honker(Polled):
    async def open(self, place: str) -> None:
        import honker

        database = honker.open(f"{place}/honker.db")
        with database.transaction() as transaction:
            transaction.execute(
                "COMMIT"
            )  # SQLite refuses to change it inside of one, and honker lets us in nowhere else
            transaction.execute("PRAGMA synchronous = FULL")
            transaction.execute("BEGIN IMMEDIATE")
        self.queue = database.queue(QUEUE)

    async def send(self, body: bytes) -> None:
        self.queue.enqueue({"body": body.decode("latin-1")})

    def take(self) -> tuple[bytes, Any] | None:
        job = self.queue.claim_one("bench")
        return None if job is None else (job.payload["body"].encode("latin-1"), job)

    async def ack(self, handle: Any) -> None:
        handle.ack()


class Redis:
    """Streams with a consumer group; the server flushes before it answers (`appendfsync always`)."""

    tasks = 64

    async def open(self, place: str) -> None:
        import redis.asyncio
        import redis.exceptions

        self.client = redis.asyncio.Redis(port=int(place))
        self.name = f"{time.monotonic_ns()}"
        with suppress(redis.exceptions.ResponseError):  # another process was first
            await self.client.xgroup_create(QUEUE, "bench", id="0", mkstream=True)

    async def send(self, body: bytes) -> None:
        await self.client.xadd(QUEUE, {"body": body})

    async def receive(self, wait: float) -> tuple[bytes, Any] | None:
        answer: Any = await self.client.xreadgroup(
            "bench", self.name, {QUEUE: ">"}, count=1, block=max(1, round(wait * 1000))
        )
        if not answer:
            return None
        ((_, ((number, fields),)),) = answer
        return fields[b"body"], number

    async def ack(self, handle: Any) -> None:
        async with self.client.pipeline(transaction=True) as pipeline:
            pipeline.xack(QUEUE, "bench", handle)
            pipeline.xdel(QUEUE, handle)
            await pipeline.execute()

    async def close(self) -> None:
        await self.client.aclose()


class RabbitMQ:
    """A quorum queue with publisher confirms, and a consumer with prefetch."""

    tasks = 64

    async def open(self, place: str) -> None:
        import aio_pika

        self.pika = aio_pika
        self.connection = await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{place}/")
        self.channel = await self.connection.channel(publisher_confirms=True)
        await self.channel.set_qos(prefetch_count=256)
        self.queue = await self.channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        self.arrived: asyncio.Queue[Any] | None = None

    async def send(self, body: bytes) -> None:
        message = self.pika.Message(body, delivery_mode=self.pika.DeliveryMode.PERSISTENT)
        await self.channel.default_exchange.publish(message, routing_key=QUEUE, mandatory=True)

    async def receive(self, wait: float) -> tuple[bytes, Any] | None:
        if self.arrived is None:
            self.arrived = asyncio.Queue()
            await self.queue.consume(self.arrived.put)
        try:
            message = await asyncio.wait_for(self.arrived.get(), max(wait, 0.001))
        except TimeoutError:
            return None
        return message.body, message

    async def ack(self, handle: Any) -> None:
        await handle.ack()

    async def close(self) -> None:
        await self.connection.close()


EMBEDDED: dict[str, type[Peer]] = {
    "huey": Huey,
    "litequeue": Litequeue,
    "persist-queue": PersistQueue,
    "honker": Honker,
}
SERVERS: dict[str, type[Peer]] = {"Redis": Redis, "RabbitMQ": RabbitMQ}
PEERS: dict[str, type[Peer]] = {"Filao": Filao, **EMBEDDED, **SERVERS}
PACKAGES = {
    "huey": "huey",
    "litequeue": "litequeue",
    "persist-queue": "persistqueue",
    "honker": "honker",
    "Redis": "redis",
    "RabbitMQ": "aio_pika",
}
