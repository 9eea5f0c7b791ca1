import asyncio

import filao

worker = filao.Worker("{file}")


@worker.consumer("claims.processing", guarantee="exactly-once")
async def evaluate(message: filao.Message, tx: filao.Transaction) -> None:
    await asyncio.sleep(2)  # the work; do it before the transaction's first statement
    print("claim", message["claim_id"], "on policy", message["policy"], "attempt", message.attempt)
    await tx.execute(
        "INSERT INTO payment (message, claim, cents, paid_by, attempt) VALUES (?, ?, ?, 'you', ?)",
        (message.id, message["claim_id"], message["amount"], message.attempt),
    )
