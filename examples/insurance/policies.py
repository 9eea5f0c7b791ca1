"""The policy service: it stores a policy and orders its document, which a generator prints when it has time."""

import json
import sqlite3

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.insurance.database import Database, insert_policy
from examples.insurance.settings import BUSINESS, outbox

db = Database(BUSINESS)


def subscribe(connection: sqlite3.Connection, holder: str) -> int:
    """Store a policy and order its document, both or neither."""
    number = insert_policy(connection, holder)
    outbox.send_to_queue(connection, "documents", {"policy": number, "holder": holder})
    return number


async def post_policy(request: Request) -> JSONResponse:
    """Take a policy."""
    try:
        holder = json.loads(await request.body())["holder"]
    except (ValueError, KeyError, TypeError):
        return JSONResponse({"error": 'a policy is a JSON object with its "holder"'}, status_code=422)
    return JSONResponse({"policy": await db.do(subscribe, str(holder))}, status_code=202)


app = Starlette(routes=[Route("/", post_policy, methods=["POST"])])
