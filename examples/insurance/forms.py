"""What customers send, read with suspicion: a bound on its size, a type for each field, and an answer that blames them.

A sender may write anything: a body without end, a number of 5,000 digits, JSON nested 100,000 deep, half a surrogate
pair. msgspec reads JSON into a dataclass whose fields say what they may hold, and refuses all of these.
"""

from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

F = TypeVar("F")

FORM_MAX = 16 * 1024  # bytes; a claim takes some 200
TEXT_MAX = 200  # characters of a name, a kind or a reference


async def read_form(request: Request, form: type[F]) -> F:
    """Return what a request holds, or raise the `HTTPException` that says what is wrong with it."""
    body = bytearray()
    async for chunk in request.stream():  # not request.body(), which reads on for ever
        body += chunk
        if len(body) > FORM_MAX:
            raise HTTPException(413, f"at most {FORM_MAX:,} bytes are read")
    try:
        return msgspec.json.decode(bytes(body), type=form)
    except RecursionError:
        raise HTTPException(422, "it is nested too deeply") from None
    except ValueError as error:  # its text names the field and what it may be, and repeats nothing
        raise HTTPException(422, str(error)) from None
