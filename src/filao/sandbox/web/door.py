"""Lets in those who come from this machine's own pages and have shown the token once. See `filao.door`."""

import secrets
from collections import OrderedDict
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from filao import door
from filao.door import LOOPBACK, Guesses, TooOftenError, client_of, cookie_of, is_of_host, is_of_other_site, safely

SESSIONS_MAX = 1_000  # remembered sessions; after that the oldest is forgotten
PAGES = ("/", "/en", "/fr")

SAFE = door.SAFE | {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'"
    ),
}

OTHER_HOST = "This sandbox answers to 127.0.0.1 and localhost only."
OTHER_SITE = "This sandbox does not answer to pages of other sites."
NO_TOKEN = "This sandbox asks for a token: open the address that it printed, which ends with ?token=…"  # noqa: S105
WRONG_TOKEN = "This is not the token of this sandbox."  # noqa: S105


class Door:
    """Lets a request in, or answers why not."""

    def __init__(self, inner: ASGIApp, token: str, *, open_to_others: bool) -> None:
        self._inner = inner
        self._guesses = Guesses(token)
        self._open_to_others = open_to_others
        self._sessions: OrderedDict[str, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            await self._inner(scope, receive, send)
            return
        headers = Headers(scope=scope)
        why = self._why_not(scope, headers)
        session = cookie_of(headers, _cookie(scope))
        if scope["type"] == "websocket":
            if why or session not in self._sessions:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": why or NO_TOKEN})
            else:
                scope["filao_session"] = session
                await self._inner(scope, receive, send)
        elif why:
            await PlainTextResponse(why, 403, SAFE)(scope, receive, send)
        elif session in self._sessions and b"token=" not in scope.get("query_string", b""):
            await self._inner(scope, receive, safely(send, SAFE))
        else:
            await self._admit(scope, receive, send)

    def _why_not(self, scope: Scope, headers: Headers) -> str:
        if not self._open_to_others and not is_of_host(headers, LOOPBACK):
            return OTHER_HOST
        if scope["type"] == "websocket" and headers.get("origin") is None:
            return OTHER_SITE
        return OTHER_SITE if is_of_other_site(headers, is_visit=scope["path"] in PAGES) else ""

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a session to whoever brings the token, and redirect to an address without it."""
        query = parse_qs(scope.get("query_string", b"").decode(errors="replace"))
        given = query.get("token", [""])[0]
        if not given:
            await PlainTextResponse(NO_TOKEN, 403, SAFE)(scope, receive, send)
            return
        try:
            is_right = await self._guesses.is_right(client_of(scope), given)
        except TooOftenError as error:
            await PlainTextResponse(str(error), 429, SAFE)(scope, receive, send)
            return
        if not is_right:
            await PlainTextResponse(WRONG_TOKEN, 403, SAFE)(scope, receive, send)
        else:
            session = secrets.token_urlsafe(24)
            self._sessions[session] = None
            while len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
            response = RedirectResponse(scope["path"] if scope["path"] in PAGES else "/", 303, SAFE)
            response.set_cookie(_cookie(scope), session, httponly=True, samesite="lax")
            await response(scope, receive, send)


def _cookie(scope: Scope) -> str:
    """Return the cookie's name: the ports of a host share its cookies, and at another one another sandbox may run."""
    _, port = scope["server"]
    return f"filao_session_{port}"
