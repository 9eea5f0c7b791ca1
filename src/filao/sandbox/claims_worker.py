"""A worker, a process of its own: it competes for claims, evaluates them, and writes down what it did.

The policy register that it asks is make-believe, and so is the time that an evaluation takes. The rest is what a worker
of yours would be: receive, work, ack; nack when the work failed. It may be killed between any two of these lines.
"""

import asyncio
import sys
from collections.abc import Awaitable
from pathlib import Path
from random import Random

import msgspec

import filao
from filao.sandbox.claims import Claim
from filao.sandbox.journal import Journal, What, journal_of
from filao.sandbox.orders import QUEUE, WorkerOrders
from filao.sandbox.parent import parent_leaves
from filao.sandbox.texts import Voice

EXCESS = 15_000  # cents that the customer bears
LETTER = 0.15  # of the work comes after the decision: the letter to the customer


class RegisterError(Exception):
    """The policy register gave no answer that the claim could be evaluated by."""


class ClaimsWorker:
    """Evaluates the claims that it gets, on several desks at once."""

    def __init__(self, broker: filao.Broker, orders: WorkerOrders) -> None:
        self._broker = broker
        self._orders = orders
        self._say = Voice(orders.language)
        self._journal = Journal(journal_of(Path(orders.journals), orders.number), orders.number)
        self._waiting: set[asyncio.Task[None]] = set()
        self._leaves = False

    async def work(self) -> None:
        """Work at every desk until the parent leaves; what is in hand then is finished first."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._orders.desks):
                tasks.create_task(self._desk())
            self._journal.write("started")
            await parent_leaves()
            self._leaves = True
            for desk in self._waiting:
                desk.cancel()

    async def _desk(self) -> None:
        while not self._leaves:
            await self._handle(await self._next())

    async def _next(self) -> filao.Message[Claim]:
        desk = asyncio.current_task()
        assert desk is not None
        self._waiting.add(desk)
        try:
            return await self._broker.receive_from_queue(QUEUE)
        finally:
            self._waiting.discard(desk)

    async def _handle(self, message: filao.Message[Claim]) -> None:
        self._note("received", message)
        try:
            paid = await self._evaluate(message.body, message.attempt)
        except RegisterError as error:
            await self._settle(message, message.nack(reason=error), "nacked", str(error))
            return
        self._note("handled", message, str(paid))
        await asyncio.sleep(LETTER * self._orders.work)
        await self._settle(message, message.ack(), "acked")

    async def _settle(
        self, message: filao.Message[Claim], settling: Awaitable[None], what: What, note: str = ""
    ) -> None:
        try:
            await settling
        except filao.LeaseLost as error:  # the machine slept, say, and another worker has the claim
            self._note("refused", message, str(error))
        else:
            self._note(what, message, note)

    async def _evaluate(self, claim: Claim, attempt: int) -> int:
        """Return the cents to be paid."""
        chance = Random(claim.number)
        await asyncio.sleep((1 - LETTER) * self._orders.work * chance.uniform(0.6, 1.4))
        if claim.number in self._orders.unknown:
            raise RegisterError(self._say("policy_unknown", policy=str(claim.policy)))
        if claim.number in self._orders.silent and attempt == 1:
            raise RegisterError(self._say("register_silent"))
        return max(0, claim.amount - EXCESS)

    def _note(self, what: What, message: filao.Message[Claim], note: str = "") -> None:
        self._journal.write(what, message=message.id, claim=message.body.number, attempt=message.attempt, note=note)


async def main() -> None:
    """Be a worker until the parent leaves."""
    orders = msgspec.json.decode(sys.argv[1], type=WorkerOrders)
    async with filao.connect(orders.file) as broker:
        await ClaimsWorker(broker, orders).work()


if __name__ == "__main__":
    asyncio.run(main())
