"""A claims worker, a process of its own: it competes for claims, evaluates and pays them, and writes down what it did.

It asks for a claim only when it is free, keeps its lease while it works, and tells every step to its journal, so that it may be
killed or stopped between any two. Like a careless worker it does not look whether its lease is lost: it is the
queue that must refuse it.
"""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import msgspec

import filao
from filao.sandbox.journal import Journal, What, journal_of
from filao.sandbox.parent import lines_of_parent
from filao.sandbox.web.orders import CLAIMS, DOCUMENTS, Duty, Post, number_in

LETTER = 0.3  # of the work comes after the payment: the letter to the customer
PAYING = 0.25  # seconds at most between the payment and the commit when both are one transaction, which holds the file's write lock
EXTENDED_AT = 1 / 3  # of its length a lease is extended
PAUSE = 1.0  # seconds after an error of the storage
EXCESS = 15_000  # cents that the customer bears


class RegisterError(Exception):
    """The policy register gave no answer that the claim could be evaluated by."""


class ClaimsWorker:
    """Evaluates one claim at a time."""

    def __init__(self, broker: filao.Broker, post: Post) -> None:
        self._broker = broker
        self._name = str(post.number)
        self._journal = Journal(journal_of(Path(post.journals), post.number), post.number)
        self._duty: Duty | None = None
        self._told = asyncio.Event()
        self._leaves = asyncio.Event()
        self._receiving: asyncio.Task[filao.Message | None] | None = None

    async def work(self) -> None:
        """Work until the parent leaves; a claim in hand that is not yet paid goes back, its attempt unused."""
        self._write("started")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            await self._told.wait()
            while not self._leaves.is_set():
                try:
                    message = await self._next()
                    if message is not None:
                        await self._handle(message)
                except filao.EngineError as error:  # a full disk, say; its claim comes back when the lease has run out
                    self._write("troubled", note=str(error))
                    await self._pass(PAUSE)

    async def _listen(self) -> None:
        """Take orders; a worker that waits for a claim asks again, under its new duty."""
        decode = msgspec.json.Decoder(Duty).decode
        async for line in lines_of_parent():
            self._duty = decode(line)
            self._told.set()
            self._ask_again()
        self._leaves.set()
        self._told.set()
        self._ask_again()

    def _ask_again(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    async def _next(self) -> filao.Message | None:
        once: filao.Guarantee = "at-most-once"
        guarantee = once if self._duty is not None and self._duty.guarantee == once else "at-least-once"
        self._receiving = asyncio.create_task(self._broker.receive_from_queue(CLAIMS, guarantee=guarantee))
        try:
            await asyncio.wait((self._receiving,))
            return None if self._receiving.cancelled() else self._receiving.result()
        finally:
            self._receiving = None

    # --- one claim ---------------------------------------------------------------------------------------------------

    async def _handle(self, message: filao.Message) -> None:
        duty = self._duty
        assert duty is not None
        self._note("received", message, "once" if message.settled else "")
        keeping = None if message.settled else asyncio.create_task(self._keep(message, duty.lease))
        try:
            cents = await self._evaluate(message, duty)
        except RegisterError as error:
            await self._give_up(message, error)
        except TimeoutError:
            await self._release(message)
        else:
            if duty.guarantee == "exactly-once":
                _end(keeping)  # else it would wait for the transaction, and find the message acknowledged
                await self._pay_and_ack(message, cents, duty)
            else:
                await self._pay_then_ack(message, cents, duty)
        finally:
            _end(keeping)

    async def _evaluate(self, message: filao.Message, duty: Duty) -> int:
        """Return the cents to be paid. Raises `TimeoutError` when the worker is to leave before that is clear."""
        policy, amount = number_in(message.body, "policy"), number_in(message.body, "amount")
        chance = Random(f"{message.id} {message.attempt}")
        await self._pass((1 - LETTER) * duty.work * chance.uniform(0.7, 1.3))
        if self._leaves.is_set() and not message.settled:
            raise TimeoutError
        if duty.fails:
            raise RegisterError("the policy register did not answer")
        if policy <= 0:
            raise RegisterError(f"policy {policy} is not in the register")
        return max(0, amount - EXCESS)

    async def _pay_then_ack(self, message: filao.Message, cents: int, duty: Duty) -> None:
        """Pay, write to the customer, acknowledge: whoever dies in between has paid, and the claim comes again."""
        async with self._broker.transaction() as tx:
            await self._pay(tx, message, cents, duty)
        self._note("handled", message)
        await self._pass(LETTER * duty.work)
        try:
            await message.ack()
        except filao.LeaseLost as error:
            self._note("refused", message, str(error))
        else:
            self._note("acked", message)

    async def _pay_and_ack(self, message: filao.Message, cents: int, duty: Duty) -> None:
        """Pay and acknowledge in one transaction: both happen or neither."""
        try:
            async with message.transaction() as tx:
                await self._pay(tx, message, cents, duty)
                self._note("paying", message)
                await asyncio.sleep(min(PAYING, LETTER * duty.work))
        except filao.LeaseLost as error:
            self._note("refused", message, str(error))
        else:
            self._note("handled", message)
            self._note("acked", message)
            await self._pass(LETTER * duty.work)

    async def _pay(self, tx: filao.Transaction, message: filao.Message, cents: int, duty: Duty) -> None:
        await tx.execute(
            "INSERT INTO payment (message, claim, cents, paid_by, attempt) VALUES (?, ?, ?, ?, ?)",
            (message.id, number_in(message.body, "claim_id"), cents, self._name, message.attempt),
        )
        if duty.documents:
            await tx.send_to_queue(DOCUMENTS, {"claim_id": number_in(message.body, "claim_id"), "cents": cents})

    async def _give_up(self, message: filao.Message, error: RegisterError) -> None:
        if message.settled:  # received at most once: there is no other time
            self._note("failed", message, str(error))
            return
        try:
            await message.nack(reason=error)
        except filao.LeaseLost as lost:
            self._note("refused", message, str(lost))
        else:
            self._note("nacked", message, str(error))

    async def _release(self, message: filao.Message) -> None:
        with suppress(filao.LeaseLost):
            await message.release()
            self._note("released", message)

    async def _keep(self, message: filao.Message, lease: float) -> None:
        """Extend the lease again and again. One that is lost is noted, and the work goes on all the same."""
        with suppress(filao.LeaseLost):
            while True:
                await asyncio.sleep(lease * EXTENDED_AT)
                await message.extend(lease)
                self._note("extended", message)
        self._note("lost", message)

    async def _pass(self, seconds: float) -> None:
        """Let time pass, but no more of it when the worker is to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaves.wait()

    def _note(self, what: What, message: filao.Message, note: str = "") -> None:
        self._write(
            what, message=message.id, claim=number_in(message.body, "claim_id"), attempt=message.attempt, note=note
        )

    def _write(self, what: What, *, message: str = "", claim: int = 0, attempt: int = 0, note: str = "") -> None:
        with suppress(OSError):  # the disk is full: the work is worth more than its record
            self._journal.write(what, message=message, claim=claim, attempt=attempt, note=note)


def _end(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()


async def main() -> None:
    """Be a worker until the parent leaves."""
    post = msgspec.json.decode(sys.argv[1], type=Post)
    async with filao.connect(post.file) as broker:
        await ClaimsWorker(broker, post).work()


if __name__ == "__main__":
    asyncio.run(main())
