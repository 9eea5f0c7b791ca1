"""The claims workers: `filao work examples.insurance.claims:worker --processes 3`.

`process_simply` is the loop of the textbooks. A worker that dies after `notify_customer` and before `ack` pays the
claim again when the next one receives it. `process_claim` cannot: the payment, the letter and the message's id are
committed together, so a second run finds the id and changes nothing. INSURANCE_GUARANTEE chooses what it promises, to
see the difference.
"""

import sqlite3

import filao
from examples.insurance.database import Claim, Database, settle_claim, write_letter
from examples.insurance.settings import BUSINESS, GUARANTEE, QUEUES, claims, inbox

COVERED = {"storm", "hail", "fire", "water", "theft", "motor"}

db = Database(BUSINESS)
worker = filao.Worker(QUEUES, grace=20)


async def evaluate_claim(claim: Claim) -> int:
    """Return what is to be paid, in cents."""
    return claim.amount if claim.type in COVERED else 0


async def pay_claim(claim: Claim, payout: int) -> None:
    """Pay, in a transaction of its own."""
    await db.do(settle_claim, claim, payout)


async def notify_customer(claim: Claim) -> None:
    """Write a letter, in a transaction of its own."""
    await db.do(write_letter, claim, f"Your claim {claim.reference} has been settled.")


async def process_simply(broker: filao.Broker) -> None:
    """Receive, work, acknowledge: a crash before the ack pays twice."""
    message = await broker.receive_from_queue("claims.processing")
    try:
        claim = await db.get_claim(message["claim_id"])
        payout = await evaluate_claim(claim)
        await pay_claim(claim, payout)
        await notify_customer(claim)
        await message.ack()
    except Exception as error:
        await message.nack(reason=error)


@worker.consumer(
    claims,
    concurrency=4,
    timeout=60,
    guarantee="at-most-once" if GUARANTEE == "at-most-once" else "at-least-once",
    outcomes={LookupError: filao.Reject},
)
async def process_claim(message: filao.Message) -> None:
    """Evaluate, pay and notify; with the inbox, once."""
    claim = await db.get_claim(message["claim_id"])
    payout = await evaluate_claim(claim)
    if GUARANTEE == "exactly-once":
        await db.do(_pay_once, message, claim, payout)
    else:
        await pay_claim(claim, payout)
        await notify_customer(claim)


def _pay_once(connection: sqlite3.Connection, message: filao.Message, claim: Claim, payout: int) -> None:
    if inbox.is_new(connection, message):
        settle_claim(connection, claim, payout)
        write_letter(connection, claim, f"Your claim {claim.reference} has been settled.")
