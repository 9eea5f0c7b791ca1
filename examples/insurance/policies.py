"""The policy service: it stores a policy and orders its document, which a generator prints when it has time."""

import sqlite3
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse

from examples.insurance.database import Database, insert_policy
from examples.insurance.forms import TEXT_MAX, read_form
from examples.insurance.settings import BUSINESS, outbox

db = Database(BUSINESS)


def subscribe(connection: sqlite3.Connection, holder: str) -> int:
    """Store a policy and order its document, both or neither."""
    number = insert_policy(connection, holder)
    outbox.send_to_queue(connection, "documents", {"policy": number, "holder": holder})
    return number


class PolicyForm(msgspec.Struct):
    """A policy as a customer asks for it."""

    holder: Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX)]


async def post_policy(request: Request) -> JSONResponse:
    """Take a policy."""
    form = await read_form(request, PolicyForm)
    return JSONResponse({"policy": await db.do(subscribe, form.holder)}, status_code=202)
