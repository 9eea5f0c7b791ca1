"""The RabbitMQ engine: the server does what it can itself, and what it cannot do is refused when a queue is declared.

Messages are published with confirms on one connection and received on another, so that a server that blocks senders
does not block acknowledgements.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelNotFoundEntity

from filao.checks import is_system_clock
from filao.engine import (
    Abandoned,
    Batch,
    Delivery,
    Extend,
    Feature,
    Nack,
    Operation,
    Receipt,
    Receive,
    Received,
    Reject,
    Release,
    Result,
    Send,
    Settle,
    Submit,
)
from filao.engines.rabbitmq import envelope, register, topology
from filao.engines.rabbitmq.burials import MOMENT, Burial, Burials, burial_of, failure
from filao.engines.rabbitmq.consumer import Consumer, Consumers
from filao.engines.rabbitmq.control import RabbitmqOperators
from filao.engines.rabbitmq.moving import RabbitmqMover
from filao.engines.rabbitmq.overview import RabbitmqOverview
from filao.engines.rabbitmq.publisher import Publisher, deleted
from filao.engines.rabbitmq.refusals import check_rules, has_delay, refused
from filao.engines.rabbitmq.register import Declared
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY, FAREWELL_WITHIN, Link, Server, Session
from filao.engines.rabbitmq.settles import Settles, lease_lost
from filao.engines.waiters import Lines, Place
from filao.errors import ConfigurationError, EngineUnavailable, FilaoError
from filao.guarded import for_ever
from filao.queue import Queue, not_found

BEGUN_WITHIN = 5.0  # seconds that a batch has at least once it begins, however long it has waited
TIDY_INTERVAL = 0.5  # seconds between looks for messages that were pushed but nobody wants
LEARN_INTERVAL = 30.0  # seconds after which the rules of the queues are read again

_R = TypeVar("_R")


class RabbitmqEngine:
    """See `filao.engine.Engine`."""

    name = "RabbitMQ"
    features: frozenset[Feature] = frozenset({Feature.LIVENESS, Feature.TTL, Feature.DEAD_LETTERS})
    emulated: frozenset[Feature] = frozenset({Feature.DELAY})
    concurrent_batches = 64  # the server itself flushes its disk once for many messages

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        if not is_system_clock(clock):
            raise ConfigurationError("clock= cannot be given with an amqp:// URL: RabbitMQ's own clock decides")
        self._server = Server(url)
        self._sending = Link(self._server, self._call_all)
        self._receiving = Link(self._server, self._call_all)
        self._publisher = Publisher(self._sending)
        self._declared = Declared(self._server)
        self._consumers = Consumers()
        self._settles = Settles(self._consumers, self._publisher)
        limited = partial(self._limited, self._sending)
        self._burials = Burials(self._publisher, limited, self._call)
        self._opening = asyncio.Lock()
        self._tokens = count(1)
        self._lines: Lines = Lines(left=self._consumers.left)
        self._is_closing = False
        self.operators: RabbitmqOperators = RabbitmqOperators(
            self._server, self._declared, self._publisher, limited, self._consumers.held
        )
        self.overview: RabbitmqOverview = RabbitmqOverview(self.operators.seen)
        self.mover: RabbitmqMover = RabbitmqMover(self._server, self._declared, self._publisher, limited)
        self.transactions: None = None

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and read which queues there are."""
        try:
            await self._declared.learn()
        except BaseException:
            await self._declared.close()
            raise
        begin = asyncio.get_running_loop().create_task
        turns = {"tidying up on RabbitMQ": self._tidy, "resting on RabbitMQ": self._consumers.rest}
        self._tidying = [begin(for_ever(what, turn)) for what, turn in turns.items()]

    def sibling(self) -> None:
        """Return None: a lease is bound to the connection on which the message was received."""

    async def close(self) -> None:
        """End the connections; what is held goes back to its queues."""
        self._is_closing = True
        self._lines.close()
        for task in self._tidying:
            task.cancel()
        try:
            await asyncio.gather(*self._tidying, return_exceptions=True)
            await self.operators.close()
            await self._burials.close()
            await self._declared.close()
            await self._receiving.close()
            await self._sending.close()
        except asyncio.CancelledError:
            self._server.drop()
            raise

    def drop(self) -> None:
        """Close all connections after the event loop has ended."""
        self._server.drop()

    # --- the data plane ----------------------------------------------------------------------------------------------

    async def execute(self, batch: Batch) -> "list[Result | asyncio.Future[Result]]":
        """Do what needs no confirm: the settles and extends first, in order, so that they wait for no receive."""
        async with self._begun(batch, self._receiving) as (operations, session):
            if len(operations) == 1:
                return [await self._result(self._work(operations[0], session))]
            results: dict[int, Result | asyncio.Future[Result]] = {}
            for place, operation in sorted(enumerate(operations), key=_receives_last):
                results[place] = await self._result(self._work(operation, session))
            return [results[place] for place in range(len(operations))]

    def needs_confirm(self, operation: Operation) -> bool:
        """Return whether the server must confirm an operation, for which it takes as long as it likes."""
        outcome = operation.outcome if isinstance(operation, Settle) else None
        is_put_off = isinstance(outcome, Release) and outcome.delay > 0
        return is_put_off or isinstance(outcome, Nack | Reject) or isinstance(operation, Send)

    async def execute_confirmed(self, batch: Batch) -> "list[Result | asyncio.Future[Result]]":
        """Do what must be confirmed, all of it at once; when the time is over, what was confirmed counts."""
        works: list[asyncio.Task[Result | asyncio.Future[Result]]] = []
        try:
            async with self._begun(batch, self._sending) as (operations, session):
                if len(operations) == 1:
                    return [await self._result(self._work(operations[0], session))]
                begin = asyncio.get_running_loop().create_task
                works += [begin(self._result(self._work(operation, session))) for operation in operations]
                return list(await asyncio.gather(*works))
        except EngineUnavailable as error:
            if not works:
                raise
            return [error if work.cancelled() else work.result() for work in works]

    @asynccontextmanager
    async def _begun(self, batch: Batch, link: Link) -> AsyncGenerator[tuple[list[Operation], Session]]:
        """Give the operations of a batch, and the session that they need, for as long as a batch may take.

        When its time is over, that session is given up and no other, so that a server that blocks senders ends no
        lease; and it is kept if the server still answers there, and only a queue does not. A batch that begins late,
        behind others that the server kept waiting, still has some time, or it would give up a session that works.
        """
        if self._is_closing:
            raise EngineUnavailable("the broker was closed meanwhile")
        until = max(batch.since + ANSWERS_WITHIN, asyncio.get_running_loop().time() + BEGUN_WITHIN)
        asked: Session | None = None
        try:
            async with asyncio.timeout_at(until) as limit:
                session = await link.session()
                operations = batch.take(lambda _: True)
                if not {operation.queue for operation in operations} <= self._declared.rules.keys():
                    await self._declared.learn()
                asked = session
                with session.hurrying(limit):
                    yield operations, session
        except TimeoutError as error:
            if asked is not None and not asked.is_open:
                raise self._server.engine_error(ConnectionResetError(asked.ended_by)) from error
            if asked is not None and not await asked.answers():
                await asked.close(FAREWELL_WITHIN)
            raise self._server.engine_error(error, begun=asked is not None) from error

    @asynccontextmanager
    async def _limited(self, link: Link) -> AsyncGenerator[Session]:
        """Give a link's session, for as long as a call that begins now may take."""
        nothing = Batch(receives=False, writes=False, take=lambda _: [], since=asyncio.get_running_loop().time())
        with self._server.mapped():
            async with self._begun(nothing, link) as (_, session):
                yield session

    async def _result(self, work: Coroutine[Any, Any, _R]) -> _R | FilaoError:
        """Return the result of an operation, which may be an error."""
        try:
            return await work
        except FilaoError as error:
            return error
        except AWAY as error:
            return self._server.engine_error(error)

    async def _work(self, operation: Operation, session: Session) -> "Result | asyncio.Future[Result]":
        queue = self._declared.rules.get(operation.queue)
        if queue is None:
            if isinstance(operation, Settle | Extend):
                return lease_lost(operation.delivery)
            return not_found(operation.queue, self._declared.rules)
        match operation:
            case Send():
                return [Receipt(name) for name in await self._publisher.send(queue, operation.drafts)]
            case Receive():
                return await self._receive(queue, operation, session)
            case Settle():
                await self._settles.settle(queue, operation)
                return None
            case Extend():
                self._settles.consumer_of(operation.delivery)  # the lease lasts anyway, if it has not ended
                return None

    async def _receive(self, queue: Queue, receive: Receive, session: Session) -> "Received | asyncio.Future[Result]":
        if receive.lease is not None:
            raise refused(
                queue.name, f"lease={receive.lease:g}", "leases that end by time: they last as connections do"
            )
        look = await self._look(queue, receive, session)
        if not look.burials:
            return Received(look.alive)
        return asyncio.get_running_loop().create_task(self._result(self._look_on(queue, receive, look)))

    async def _look(self, queue: Queue, receive: Receive, session: Session) -> "_Look":
        """Take messages once, and begin to bury those that must not be handed over."""
        waiting = max(receive.limit, self._wanted(queue.name)) if receive.waiting else 0
        try:
            consumer = await self._consumer(queue.name, session)
            messages = await consumer.take(receive.limit, waiting)
        except ChannelNotFoundEntity:
            self._declared.learnt_at = 0.0  # soon anew; those who receive with us are told the same
            raise deleted(queue.name) from None
        alive: list[Delivery] = []
        dead: list[Burial] = []
        for message in messages:
            delivery = envelope.read(queue.name, message, consumer.token, self._publisher.name)
            burial = burial_of(queue, delivery, message)
            if burial is None:
                alive.append(delivery)
            else:
                dead.append(burial)
        return _Look(consumer, messages, alive, [self._burials.begin(consumer, burial) for burial in dead])

    async def _look_on(self, queue: Queue, receive: Receive, look: "_Look") -> Result:
        """Wait a moment for burials, whose failure is then raised, and look for the messages behind them."""
        until = asyncio.get_running_loop().time() + MOMENT
        while look.burials:
            try:
                failed = await failure(look.burials, until)
                if failed is not None:
                    raise failed
            except BaseException:  # the caller does not get the other messages
                await look.consumer.give_back(look.messages)
                raise
            if look.alive or self._burials.is_full():
                break
            async with self._limited(self._receiving) as session:
                look = await self._look(queue, receive, session)
        return Received(look.alive)

    async def _consumer(self, queue: str, session: Session) -> Consumer:
        consumer = self._consumers.get(queue)
        if consumer is not None and consumer.is_open:
            return consumer
        async with self._opening:
            consumer = self._consumers.get(queue)
            if consumer is None or not consumer.is_open:
                channel = await session.channel()
                call, wanted = partial(self._call, queue), partial(self._wanted, queue)
                consumer = self._consumers[queue] = Consumer(channel, next(self._tokens), queue, call, wanted)
            return consumer

    # --- waking ------------------------------------------------------------------------------------------------------

    def waiter(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Place:
        """Take a place to wait for a queue."""
        return self._lines.place(receive, submit, abandoned)

    def _wanted(self, queue: str) -> int:
        """Return how many messages those that wait for a queue want."""
        line = self._lines.get(queue)
        return 0 if line is None else line.wanted()

    def _call(self, queue: str) -> None:
        """Let the line of a queue look, because something was pushed for it."""
        line = self._lines.get(queue)
        if line is not None:
            line.call()

    def _call_all(self) -> None:
        """Let all lines look: the connection has ended, and nothing more is pushed to them."""
        self._lines.call()

    def rest(self, queues: Iterable[str]) -> None:
        """See `filao.session.Pushing`: a task does it, as a call that is cancelled would end the leases."""
        self._consumers.forsaken(queues)

    async def _tidy(self) -> None:
        """Every now and then, give back what was pushed but nobody wants, and learn of changed rules."""
        now = asyncio.get_running_loop().time
        await asyncio.sleep(TIDY_INTERVAL)
        with suppress(*AWAY):  # the callers of a server that fails get its error
            for consumer in list(self._consumers.values()):
                if consumer.is_open:
                    await consumer.tidy()
            if now() - self._declared.learnt_at > LEARN_INTERVAL:
                await self._declared.learn()

    # --- queues ------------------------------------------------------------------------------------------------------

    async def declare(self, queue: Queue) -> None:
        """Create the queue or give it these rules."""
        check_rules(queue)
        async with self._declared.apart() as call:
            async with call.session.aside() as channel:
                await topology.declare_queue(channel, queue)
                if has_delay(queue):
                    await topology.declare_ladder(channel)
                    await topology.bind_to_ladder(channel, queue.name)
            await register.enter(call.session, self._server, queue)
        self._declared.rules[queue.name] = queue

    async def find(self, queue: str) -> Queue:
        """Return a queue with its rules, from the whole register."""
        return await self._declared.rules_of(queue, anew=True)


@dataclass(frozen=True, slots=True)
class _Look:
    """The messages that one look has taken."""

    consumer: Consumer
    messages: Sequence[DeliveredMessage]
    alive: list[Delivery]
    burials: "Sequence[asyncio.Task[FilaoError | None]]"
    """The burials of the others, under way."""


def _receives_last(entry: tuple[int, Operation]) -> bool:
    return isinstance(entry[1], Receive)
