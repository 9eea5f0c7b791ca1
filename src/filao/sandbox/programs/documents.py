import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"), filao.Queue("documents"))
        await broker.send_to_queue("claims.processing", {"claim_id": 7})

        claim = await broker.receive_from_queue("claims.processing")
        async with claim.transaction() as tx:  # the note and the acknowledgement, together
            await tx.send_to_queue("documents", {"letter": "paid", "claim_id": claim["claim_id"]})

        note = await broker.receive_from_queue("documents")
        print("writing the letter for claim", note["claim_id"])
        await note.ack()


asyncio.run(main())
