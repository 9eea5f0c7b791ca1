"""The customer portal: it answers at once, with the claim's id and "submitted"; the work is done elsewhere.

    POST /claims {"policy": 12, "type": "storm", "amount": 12000, "reference": "…"}  →  202 {"claim_id": 7, "status": "submitted"}
    GET /claims/7  →  {"claim_id": 7, "status": "paid"}

`submit_simply` is the two lines that everybody writes first. Between them the portal can die: the claim is stored, the
message is not sent, and nobody ever works on it. `submit_safely` records the message with the claim, in one transaction.
"""

import json
import sqlite3
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

import filao
from examples.insurance import policies
from examples.insurance.database import Claim, Database, get_claim, insert_claim
from examples.insurance.settings import BUSINESS, outbox

NUMBER_MAX = 2**53  # what JSON can carry, and SQLite hold

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
    """Take a claim."""
    try:
        data = _checked(json.loads(await request.body()))
    except ValueError as error:
        return JSONResponse({"error": str(error)}, status_code=422)
    return JSONResponse(await submit_safely(data), status_code=202)


async def show_claim(request: Request) -> JSONResponse:
    """Tell how a claim stands."""
    number = request.path_params["claim_id"]
    claim = await db.do(get_claim, number) if number <= NUMBER_MAX else None
    if claim is None:
        return JSONResponse({"error": f"there is no claim {request.path_params['claim_id']}"}, status_code=404)
    return JSONResponse({"claim_id": claim.id, "status": claim.state, "type": claim.type, "amount": claim.amount})


def _checked(data: Any) -> dict[str, Any]:
    wanted = {"policy": int, "type": str, "amount": int}
    if not isinstance(data, dict):
        raise ValueError("a claim is a JSON object with policy, type and amount")  # noqa: TRY004  # it is the request's value
    wrong = [
        name for name, kind in wanted.items() if not isinstance(data.get(name), kind) or isinstance(data[name], bool)
    ]
    if wrong or not 0 <= data["amount"] <= NUMBER_MAX or not 0 <= data["policy"] <= NUMBER_MAX:
        raise ValueError(
            f"{', '.join(wrong) or 'amount or policy'}: policy and amount (cents) are whole numbers from 0 to {NUMBER_MAX}, "
            f"type is text"
        )
    data["type"].encode()  # half of a surrogate pair is no text; this raises a ValueError that says so
    return {**data, "reference": str(data.get("reference") or uuid.uuid4())}


app = Starlette(
    routes=[
        Route("/claims", post_claim, methods=["POST"]),
        Route("/claims/{claim_id:int}", show_claim),
        Mount("/policies", app=policies.app),
    ]
)
