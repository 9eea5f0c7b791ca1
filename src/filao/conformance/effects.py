"""Work, sends and acknowledgement in one transaction."""

from filao.conformance.stage import Stage, equal, needs, raises
from filao.engine import Feature
from filao.errors import ConfigurationError, LeaseLost


@needs(Feature.TRANSACTIONS)
async def check_a_transaction_commits_work_sends_and_ack_together(stage: Stage) -> None:
    queue, answers = await stage.queue(), await stage.queue()
    await stage.send(queue, "work")
    message = await stage.next(queue)
    async with message.transaction() as tx:
        await tx.execute("CREATE TABLE IF NOT EXISTS conformance_paid (claim INTEGER)")
        await tx.execute("INSERT INTO conformance_paid VALUES (?)", (7,))
        await tx.send_to_queue(answers.name, "answer")
        await tx.send_many(answers, ["more", "and more"])
        equal([tuple(row) for row in await tx.execute("SELECT claim FROM conformance_paid")], [(7,)])
    equal(message.settled, True)
    await stage.counted(queue, ready=0, acked=1)
    equal(await stage.drain(answers), ["answer", "more", "and more"])
    async with stage.broker.transaction() as tx:
        await tx.execute("DROP TABLE conformance_paid")


@needs(Feature.TRANSACTIONS)
async def check_a_transaction_that_fails_undoes_all_of_it(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "work")
    message = await stage.next(queue)
    try:
        async with message.transaction() as tx:
            await tx.send_to_queue(queue, "never")
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    equal(message.settled, False)
    await stage.counted(queue, ready=0, sent=1, leased=1, acked=0)
    await message.ack()
    await stage.nothing(queue)


@needs(Feature.TRANSACTIONS)
async def check_an_error_of_the_callers_leaves_a_transaction_as_it_is(stage: Stage) -> None:
    """Though it is of a kind that the storage's own errors are made of."""
    queue = await stage.queue()
    for theirs in (TimeoutError("theirs"), ConnectionResetError("theirs"), FileNotFoundError("theirs")):
        try:
            async with stage.broker.transaction() as tx:
                await tx.send_to_queue(queue, "undone")
                raise theirs
        except (TimeoutError, OSError) as error:
            equal(error is theirs, True)
    await stage.counted(queue, ready=0, sent=0)


@needs(Feature.TRANSACTIONS)
async def check_a_statement_that_would_end_the_transaction_is_refused(stage: Stage) -> None:
    queue = await stage.queue()
    try:
        async with stage.broker.transaction() as tx:
            await tx.send_to_queue(queue, "undone")
            for word in ("COMMIT", "END", "ROLLBACK", "SAVEPOINT one", "PREPARE TRANSACTION 'one'"):
                for before in ("", "/* done */ ", "-- done\n", " /* a */ -- b\n /* c */", "; ", "\ufeff"):
                    await raises(ConfigurationError, tx.execute(before + word), word.split(maxsplit=1)[0])
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, sent=0)


@needs(Feature.TRANSACTIONS, Feature.FENCING)
async def check_a_transaction_cannot_ack_what_another_holds(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "work")
    zombie = await stage.next(queue)
    await stage.advance(6)
    owner = await stage.next(queue)
    entered = False
    try:
        async with zombie.transaction():
            entered = True
    except LeaseLost:
        pass
    equal(entered, False)
    async with stage.broker.transaction() as tx:
        await tx.send_to_queue(queue, "next")
        await tx.ack(owner)
    equal(owner.settled, True)
    equal(await stage.drain(queue), ["next"])


@needs(Feature.TRANSACTIONS)
async def check_a_broker_call_inside_its_own_transaction_is_refused(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.broker.transaction() as tx:
        await raises(ConfigurationError, stage.broker.send_to_queue(queue, 1), "transaction")
        await tx.send_to_queue(queue, 2)
    await raises(ConfigurationError, tx.send_to_queue(queue, 3), "ended")
    equal(await stage.drain(queue), [2])


@needs(Feature.TRANSACTIONS)
async def check_a_transaction_loses_the_lease_of_a_queue_that_was_deleted_and_declared_anew(stage: Stage) -> None:
    queue, elsewhere = await stage.queue(), await stage.queue()
    await stage.send(queue, "gone")
    message = await stage.next(queue)
    async with stage.connect() as other:
        await other.delete_queue(queue, messages=True)
        await other.declare(queue)
        try:
            async with stage.broker.transaction() as tx:
                await tx.send_to_queue(elsewhere, "undone")
                await tx.ack(message)
        except LeaseLost:
            pass
        else:
            raise AssertionError("what was deleted was acknowledged")
        await other.send_to_queue(queue, "new")
        await (await stage.next(queue)).ack()
    await stage.nothing(elsewhere)
