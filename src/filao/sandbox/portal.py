"""The producer, a separate process: it sends the claims that customers hand in, and writes down each receipt.

It answers a customer as soon as the queue has confirmed, whether or not anybody works.
"""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

import filao
from filao.sandbox.journal import PORTAL, Journal, What, journal_of
from filao.sandbox.orders import CLAIMS, Claim, Post, Submission
from filao.sandbox.parent import lines_of_parent
from filao.sandbox.rows import Rows


class Portal:
    """Sends claims, all of a submission at once: their sends share commits."""

    def __init__(self, broker: filao.Broker, journal: Journal, rows: Rows) -> None:
        self._broker = broker
        self._journal = journal
        self._rows = rows

    async def submit(self, submission: Submission) -> None:
        """Send claims; each customer has an answer when the send of that claim returns."""
        async with asyncio.TaskGroup() as sends:
            for claim in submission.claims:
                sends.create_task(self._send(claim, grouped=submission.grouped))

    async def _send(self, claim: Claim, *, grouped: bool) -> None:
        began = time.perf_counter()
        group = f"policy-{claim.policy}" if grouped else None
        try:
            receipt = await self._broker.send_to_queue(CLAIMS, msgspec.to_builtins(claim), group=group)
        except filao.FilaoError as error:
            self._note("unsent", claim, "", str(error))
        else:
            answered = f"{(time.perf_counter() - began) * 1000:.1f}"
            self._note("sent", claim, receipt.id, answered, self._rows.row(receipt.id, as_sent=True))

    def _note(self, what: What, claim: Claim, message: str, note: str, row: str = "") -> None:
        with suppress(OSError):  # the disk is full: the claim is worth more than its record
            self._journal.write(what, message=message, claim=claim.claim_id, note=note, row=row)


async def main() -> None:
    """Run the portal until the parent leaves."""
    post = msgspec.json.decode(sys.argv[1], type=Post)
    decode = msgspec.json.Decoder(Submission).decode
    journal = Journal(journal_of(Path(post.journals), PORTAL), PORTAL)
    async with filao.connect(post.file) as broker:
        portal = Portal(broker, journal, Rows(post.file))
        journal.write("started")
        async for line in lines_of_parent():
            await portal.submit(decode(line))


if __name__ == "__main__":
    asyncio.run(main())
