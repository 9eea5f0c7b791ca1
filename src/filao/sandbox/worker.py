"""A consumer, a process of its own: it competes for claims, evaluates and pays them, and writes down what it did.

It asks for a claim only when it is free, extends its lease while it works, and writes every step to its journal, so
that it may be killed or stopped between any two. Like a careless consumer it does not check whether its lease is lost:
the queue must refuse it.
"""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import msgspec

import filao
from filao.sandbox.journal import Journal, What, journal_of
from filao.sandbox.orders import CLAIMS, DOCUMENTS, WORK_LEAST, Duty, Moment, Post, effort_in, number_in
from filao.sandbox.parent import lines_of_parent
from filao.sandbox.rows import Rows

LETTER = 0.25  # the part of the work that comes after the payment: the notice to the customer
PAYING = 0.25  # seconds at most that payment and acknowledgement stay uncommitted, while others cannot write
TICK = 0.1  # seconds of work after which a consumer looks at its orders
HALTED_MAX = 20.0  # seconds that a consumer stands still at most
EXTENDED_AT = 1 / 3  # the part of its length after which a lease is extended
PAUSE = 1.0  # seconds after an error of the storage
EXCESS = 15_000  # cents that the customer bears


class RegisterError(Exception):
    """The policy register gave no usable answer; the text is the key of one of the page's texts."""


class ClaimsWorker:
    """Evaluates one claim at a time."""

    def __init__(self, broker: filao.Broker, post: Post) -> None:
        self._broker = broker
        self._name = str(post.number)
        self._journal = Journal(journal_of(Path(post.journals), post.number), post.number)
        self._rows = Rows(post.file)
        self._duty: Duty | None = None
        self._told = asyncio.Event()
        self._leaves = asyncio.Event()
        self._receiving: asyncio.Task[filao.Message | None] | None = None

    async def work(self) -> None:
        """Work until the parent leaves. A claim in hand that is not yet paid goes back; its attempt does not count."""
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
        """Take orders. When they change the guarantee, a consumer that waits for a claim asks anew."""
        decode = msgspec.json.Decoder(Duty).decode
        async for line in lines_of_parent():
            before, self._duty = self._duty, decode(line)
            self._told.set()
            if before is None or before.guarantee != self._duty.guarantee:
                self._ask_again()
        self._leaves.set()
        self._told.set()
        self._ask_again()

    def _ask_again(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    @property
    def _orders(self) -> Duty:
        assert self._duty is not None
        return self._duty

    async def _next(self) -> filao.Message | None:
        once: filao.Guarantee = "at-most-once"
        guarantee = once if self._orders.guarantee == once else "at-least-once"
        self._receiving = asyncio.create_task(self._broker.receive_from_queue(CLAIMS, guarantee=guarantee))
        try:
            await asyncio.wait((self._receiving,))
            return None if self._receiving.cancelled() else self._receiving.result()
        finally:
            self._receiving = None

    # --- one claim ---------------------------------------------------------------------------------------------------

    async def _handle(self, message: filao.Message) -> None:
        guarantee = self._orders.guarantee
        lease = self._orders.lease
        self._note("received", message, "once" if message.settled else "", lease)
        keeping = None if message.settled else asyncio.create_task(self._keep(message, lease))
        try:
            cents = await self._evaluate(message, 1.0 if guarantee == "exactly-once" else 1.0 - LETTER)
        except RegisterError as error:
            await self._give_up(message, error)
        except TimeoutError:
            await self._release(message)
        else:
            if guarantee == "exactly-once":
                _end(keeping)  # else its `extend` would wait for the transaction, and find the message acknowledged
                await self._pay_and_ack(message, cents)
            else:
                await self._pay_then_ack(message, cents)
        finally:
            _end(keeping)

    async def _evaluate(self, message: filao.Message, part: float) -> int:
        """Return the cents to be paid. Raises `TimeoutError` when the consumer is to leave before it knows them."""
        policy, amount = number_in(message.body, "policy"), number_in(message.body, "amount")
        chance = Random(f"{message.id} {message.attempt}")
        effort = part * effort_in(message.body) * chance.uniform(0.9, 1.1)
        await self._labour(effort / 2)
        await self._halt(message, "evaluating")
        await self._labour(effort / 2)
        if self._leaves.is_set() and not message.settled:
            raise TimeoutError
        if self._orders.fails or chance.random() < self._orders.failing:
            raise RegisterError("register_silent")
        if policy <= 0:
            raise RegisterError("policy_unknown")
        return max(0, amount - EXCESS)

    async def _labour(self, effort: float) -> None:
        """Let the time pass that an effort takes, which may change meanwhile. While stopped, a process makes none."""
        done = 0.0
        while done < effort and not self._leaves.is_set():
            work = max(self._orders.work, WORK_LEAST)
            seconds = min(TICK, (effort - done) * work)
            await self._pass(seconds)
            done += seconds / work

    async def _halt(self, message: filao.Message, moment: Moment) -> None:
        """Stand still here if that was ordered, until the order changes."""
        halt = self._orders.halt
        is_meant = halt is not None and (halt.claim, halt.moment) == (number_in(message.body, "claim_id"), moment)
        if not is_meant or message.attempt > 1:
            return
        self._note("halted", message, moment)
        until = time.monotonic() + HALTED_MAX
        while self._orders.halt == halt and time.monotonic() < until and not self._leaves.is_set():
            await self._pass(TICK)

    async def _pay_then_ack(self, message: filao.Message, cents: int) -> None:
        """Pay, tell the customer, acknowledge. When the consumer dies in between, a claim that is paid comes back."""
        async with self._broker.transaction() as tx:
            await self._pay(tx, message, cents)
        self._note("handled", message)
        await self._halt(message, "paid")
        await self._labour(LETTER * effort_in(message.body))
        try:
            await message.ack()
        except filao.LeaseLost as error:
            self._note("refused", message, str(error))
        else:
            self._note("acked", message)

    async def _pay_and_ack(self, message: filao.Message, cents: int) -> None:
        """Pay and acknowledge in one transaction: both happen or neither."""
        try:
            async with message.transaction() as tx:
                await self._pay(tx, message, cents)
                self._note("paying", message)
                await self._halt(message, "paid")
                await self._pass(min(PAYING, LETTER * self._orders.work))
        except filao.LeaseLost as error:
            self._note("refused", message, str(error))
        else:
            self._note("handled", message, "together")
            self._note("acked", message)

    async def _pay(self, tx: filao.Transaction, message: filao.Message, cents: int) -> None:
        await tx.execute(
            "INSERT INTO payment (message, claim, cents, paid_by, attempt) VALUES (?, ?, ?, ?, ?)",
            (message.id, number_in(message.body, "claim_id"), cents, self._name, message.attempt),
        )
        if self._orders.documents:
            await tx.send_to_queue(DOCUMENTS, {"claim_id": number_in(message.body, "claim_id"), "cents": cents})

    async def _give_up(self, message: filao.Message, error: RegisterError) -> None:
        if message.settled:  # received at most once: there is no other time
            self._note("failed", message, str(error))
            return
        try:
            await message.nack(reason=str(error))
        except filao.LeaseLost as lost:
            self._note("refused", message, str(lost))
        else:
            self._note("nacked", message, str(error))

    async def _release(self, message: filao.Message) -> None:
        with suppress(filao.LeaseLost):
            await message.release()
            self._note("released", message)

    async def _keep(self, message: filao.Message, lease: float) -> None:
        """Extend the lease again and again. When it is lost, that is noted, and the work goes on all the same."""
        with suppress(filao.LeaseLost):
            while True:
                await asyncio.sleep(lease * EXTENDED_AT)
                await message.extend(lease)
                self._note("extended", message, "", lease)
        self._note("lost", message)

    async def _pass(self, seconds: float) -> None:
        """Let time pass, or return at once when the consumer is to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaves.wait()

    def _note(self, what: What, message: filao.Message, note: str = "", lease: float = 0.0) -> None:
        with suppress(OSError):  # the disk is full: the work is worth more than its record
            self._journal.write(
                what,
                message=message.id,
                claim=number_in(message.body, "claim_id"),
                attempt=message.attempt,
                note=note,
                until=time.monotonic() + lease if lease else 0.0,
                row=self._rows.row(message.id),
            )

    def _write(self, what: What, *, note: str = "") -> None:
        with suppress(OSError):
            self._journal.write(what, note=note)


def _end(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()


async def main() -> None:
    """Run a consumer until the parent leaves."""
    post = msgspec.json.decode(sys.argv[1], type=Post)
    async with filao.connect(post.file) as broker:
        await ClaimsWorker(broker, post).work()


if __name__ == "__main__":
    asyncio.run(main())
