"""Who is let in: those who come from this machine's own pages and have shown the token once.

Requests whose `Host` or `Origin` is another site's, or that a browser says another site has caused, are refused, so
that no page of the web can reach a sandbox through its visitor's browser; and no page of another site can frame it.
"""

import asyncio
import hmac
import secrets
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = "filao_session"  # the cookie's name
SESSIONS_MAX = 1_000  # that are remembered; the oldest is forgotten
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GUESS_COSTS = 0.5  # seconds that a wrong token costs; guesses wait for each other
GUESSES_MAX = 16  # that may wait at a time
PAGES = ("/", "/en", "/fr")

SAFE = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'"
    ),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

OTHER_HOST = "This sandbox answers to 127.0.0.1 and localhost only."
OTHER_SITE = "This sandbox does not answer to pages of other sites."
NO_TOKEN = "This sandbox asks for a token: open the address that it printed, which ends with ?token=…"  # noqa: S105
WRONG_TOKEN = "This is not the token of this sandbox."  # noqa: S105


class Door:
    """Lets in, or says why not."""

    def __init__(self, inner: ASGIApp, token: str, *, open_to_others: bool) -> None:
        self._inner = inner
        self._token = token.encode()
        self._open_to_others = open_to_others
        self._sessions: OrderedDict[str, None] = OrderedDict()
        self._guessing = asyncio.Lock()
        self._guesses = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self._inner(scope, receive, send)
            return
        headers = Headers(scope=scope)
        why = self._why_not(scope, headers)
        session = _session_of(headers)
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
            await self._inner(scope, receive, _safely(send))
        else:
            await self._admit(scope, receive, send)

    def _why_not(self, scope: Scope, headers: Headers) -> str:
        if not self._open_to_others and _host(headers) not in LOOPBACK:
            return OTHER_HOST
        origin = headers.get("origin")
        if origin is None and scope["type"] == "websocket":
            return OTHER_SITE
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return OTHER_SITE
        is_visit = headers.get("sec-fetch-mode", "navigate") == "navigate" and scope["path"] in PAGES
        if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site") and not is_visit:
            return OTHER_SITE
        return ""

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a session to those that bring the token, and send them to a page of ours without it in the address."""
        query = parse_qs(scope.get("query_string", b"").decode(errors="replace"))
        given = query.get("token", [""])[0]
        if not given:
            await PlainTextResponse(NO_TOKEN, 403, SAFE)(scope, receive, send)
        elif self._guesses >= GUESSES_MAX:
            await PlainTextResponse("Too many guesses at a time.", 429, SAFE)(scope, receive, send)
        elif not await self._is_right(given):
            await PlainTextResponse(WRONG_TOKEN, 403, SAFE)(scope, receive, send)
        else:
            session = secrets.token_urlsafe(24)
            self._sessions[session] = None
            while len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
            response = RedirectResponse(scope["path"] if scope["path"] in PAGES else "/", 303, SAFE)
            response.set_cookie(SESSION, session, httponly=True, samesite="lax")
            await response(scope, receive, send)

    async def _is_right(self, given: str) -> bool:
        """Compare a token, one after the other; a wrong one lets the next wait."""
        self._guesses += 1
        try:
            async with self._guessing:
                if hmac.compare_digest(given.encode(), self._token):
                    return True
                await asyncio.sleep(GUESS_COSTS)
                return False
        finally:
            self._guesses -= 1


def _session_of(headers: Headers) -> str:
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[SESSION].value if SESSION in cookies else ""


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _safely(send: Send) -> Send:
    """Return a send that adds the headers that no answer of ours goes without."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SAFE.items():
                headers[name] = value
        await send(message)

    return sending
