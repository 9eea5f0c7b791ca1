import asyncio

import filao


async def main() -> None:
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        for claim_id in range(1, 6):
            await broker.send_to_queue("claims.processing", {"claim_id": claim_id, "type": "storm"})
            print("submitted", claim_id)  # from here on it survives a power cut


asyncio.run(main())
