"""The customer portal: it answers at once, with the claim's id and "submitted"; the work is done elsewhere.

    POST /claims {"policy": 12, "type": "storm", "amount": 12000, "reference": "…"}  →  202 {"claim_id": 7, "status":
    "submitted"} GET /claims/7  →  {"claim_id": 7, "status": "paid"}

`submit_simply` is the two lines that everybody writes first. Between them the portal can die: the claim is stored, the
message is not sent, and nobody ever works on it. `submit_safely` records the message with the claim, in one
transaction.

It asks nobody who they are: put it behind your sign-in, and let it show a claim to its own customer only. A reference
belongs to its policy, so that nobody is told of another's claim by guessing one.
"""

import sqlite3
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import filao
from examples.insurance import policies
from examples.insurance.database import Claim, Database, ReferenceUsedError, get_claim, insert_claim
from examples.insurance.forms import TEXT_MAX, read_form
from examples.insurance.settings import BUSINESS, outbox

NUMBER_MAX = 2**53  # what JSON can carry, and SQLite hold
DIGITS_MAX = 16  # of a number up to there

Number = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)]


class ClaimForm(msgspec.Struct):
    """A claim as a customer sends it."""

    policy: Number
    type: Text
    amount: Number
    """Cents."""
    reference: Text = msgspec.field(default_factory=lambda: str(uuid.uuid4()))
    """The customer's own; the same again is the same claim."""


db = Database(BUSINESS)


def now() -> str:
    """Return the time as messages carry it."""
    return datetime.now(UTC).isoformat()


async def submit_simply(broker: filao.Broker, data: dict[str, Any]) -> dict[str, Any]:
    """Insert, then send: a crash between the two loses the claim's message."""
    claim = await db.insert_claim(data)
    await broker.send_to_queue("claims.processing", {
        "claim_id": claim.id, "type": claim.type,
        "timestamp": now()})  # fmt: skip
    return {"status": "submitted", "claim_id": claim.id}


async def submit_safely(data: dict[str, Any]) -> dict[str, Any]:
    """Insert and record the send in one transaction: both or neither; the relay does the rest."""
    claim = await db.do(_insert_and_record, data)
    return {"status": "submitted", "claim_id": claim.id}


def _insert_and_record(connection: sqlite3.Connection, data: dict[str, Any]) -> Claim:
    claim, new = insert_claim(connection, data)
    if new:
        message = {"claim_id": claim.id, "type": claim.type, "timestamp": now()}
        outbox.send_to_queue(connection, "claims.processing", message)
    return claim


async def post_claim(request: Request) -> JSONResponse:
    """Take a claim. A request that is repeated with its reference is answered as it was the first time."""
    form = await read_form(request, ClaimForm)
    try:
        answer = await submit_safely(msgspec.structs.asdict(form))
    except ReferenceUsedError:
        return JSONResponse({"error": "you used this reference for a claim that says something else"}, status_code=409)
    return JSONResponse(answer, status_code=202)


async def show_claim(request: Request) -> JSONResponse:
    """Tell how a claim stands."""
    number = request.path_params["claim_id"]
    known = number.isascii() and number.isdigit() and len(number) <= DIGITS_MAX  # int() refuses what is too long
    claim = await db.do(get_claim, int(number)) if known else None
    if claim is None:
        return JSONResponse({"error": "there is no such claim"}, status_code=404)
    return JSONResponse({"claim_id": claim.id, "status": claim.state, "type": claim.type, "amount": claim.amount})


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """Answer what a handler raised to say no."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


app = Starlette(
    routes=[
        Route("/claims", post_claim, methods=["POST"]),
        Route("/claims/{claim_id}", show_claim),
        Route("/policies/", policies.post_policy, methods=["POST"]),
    ],
    exception_handlers={HTTPException: refuse},
)
