"""Whom the dashboard lets in: this machine, or users who have given the token, or those whom the application admits.

The cookie of a session is signed with a key derived from the token, so that every process with this token accepts it,
and nothing need be remembered. Each session has a proof, which every form contains and no page of another site knows.
"""

import asyncio
import base64
import getpass
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import cache
from inspect import isawaitable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from filao import door
from filao.codec import shown
from filao.dashboard.neighbours import is_of_another_user
from filao.door import (
    LOOPBACK,
    Guesses,
    TooOftenError,
    client_of,
    cookie_of,
    is_of_host,
    is_of_other_site,
    path_of,
    prefix_of,
    safely,
)
from filao.languages import LANGUAGES
from filao.printable import printable

log: logging.Logger = logging.getLogger("filao.dashboard")

TOKEN_LEAST = 12  # characters: a shorter token could be guessed from a cookie
SESSION_LASTS = 12 * 3_600  # seconds
NAME_MAX = 64  # characters of the name that a user gives with the token
FORM_MAX = 2 * 1024 * 1024  # bytes: an edited body, and the other fields ...
ENTER_MAX = 16 * 1024  # ... and a token and a name: what strangers send is held in memory while it comes
FORM_DRAINED = 16 * 1024 * 1024  # bytes read of a form that is too large: browsers read no answer while they send
FORM_WITHIN = 30.0  # seconds for a form to come: the bound of every wait ...
ADMITTED_WITHIN = 30.0  # ... and for the application to say whether it admits somebody

SAFE = door.SAFE | {
    "referrer-policy": "same-origin",  # under no-referrer, browsers send forms with the origin `null`
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}

OTHER_HOST = "This dashboard answers to other names of hosts: {}.\n"
OTHER_SITE = (
    "This dashboard does not answer to pages of other sites. Is this one its own, behind a proxy? Then have the proxy "
    "pass the header Host on as it came.\n"
)
NOT_HERE = (
    "This dashboard answers to its own machine, and to the user who runs it. Give it a token (--token), or let the "
    "application admit people.\n"
)
NOT_ADMITTED = "The application does not admit you to this dashboard.\n"
BAD_FORMS = {
    "form_too_large": (413, "This form has at most {most:,} bytes.\n"),
    "form_unreadable": (400, "The form did not come whole, or cannot be read.\n"),
}
OUR_PAGE = re.compile(rf"/(?:{'|'.join(LANGUAGES)})/(?!act\b)[a-z]+(?:\?.*)?", re.DOTALL)
"""What may be led to, once somebody has come in: nothing of another site, and nothing that Enter would confirm."""
FORWARDED = ("forwarded", "x-forwarded-", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "via")
"""What the names of headers begin with that proxies set, and browsers do not."""

Admit = Callable[[Scope], str | Awaitable[str | None] | None]
"""Returns the user's name for the log, or None for one that is not let in; it may be a coroutine function."""


class FormError(Exception):
    """A form cannot be used, for one of the reasons in `BAD_FORMS`."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(what)
        self.what = what
        self.status, text = BAD_FORMS[what]
        self.text: str = text.format(most=most)


@dataclass(frozen=True, slots=True)
class Visitor:
    """A user who was let in."""

    who: str
    """Their name for the log."""
    proof: str
    """The proof that their forms must contain."""
    has_session: bool
    """Whether they came in with the token, and so can leave."""


class Door:
    """Lets visitors in, or says why not; behind it, `scope["filao_visitor"]` is the `Visitor`."""

    def __init__(
        self,
        inner: ASGIApp,
        enter: Callable[[Scope, bool], Response],
        *,
        token: str | None,
        admit: Admit | None,
        hosts: Collection[str] | None,
    ) -> None:
        self._inner = inner
        self._enter = enter
        """Answers somebody who has not come in, told whether a token was wrong: with the page that asks for it."""
        self._guesses = None if token is None else Guesses(token)
        self._key = secrets.token_bytes(32) if token is None else hashlib.sha256(f"filao {token}".encode()).digest()
        self._admit = admit
        self._has_complained = False
        """Whether it was logged that `admit` returns what is no name."""
        self._hosts = None if hosts is None else [host.lower() for host in hosts]
        self._cookie = f"filao_{hashlib.sha256(self._key).hexdigest()[:8]}"  # ports share cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        send = safely(send, SAFE)
        answer = self._refusal(scope, headers)
        if answer is None:
            answer = await self._let_in(scope, receive, headers)
        if answer is not None:
            await answer(scope, receive, send)
            return
        await self._inner(scope, receive, self._keeping(scope, send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if self._hosts is not None and not is_of_host(headers, self._hosts):
            return PlainTextResponse(OTHER_HOST.format(", ".join(self._hosts)), 403)
        if is_of_other_site(headers, is_visit=scope["method"] == "GET"):
            return PlainTextResponse(OTHER_SITE, 403)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("GET or POST.\n", 405, {"allow": "GET, HEAD, POST"})
        return None

    async def _let_in(self, scope: Scope, receive: Receive, headers: Headers) -> Response | None:
        """Return the answer to those who do not come in; None lets them through."""
        session = self._session(cookie_of(headers, self._cookie))
        path = path_of(scope)
        is_post = scope["method"] == "POST"
        who = _named(session, client_of(scope))
        if self._admit is not None:
            admitted = await self._admitted(self._admit, scope)
            if admitted is None:
                return PlainTextResponse(NOT_ADMITTED, 403)
            who = admitted
        elif self._guesses is not None:
            if path == "/enter" and is_post:
                return await self._try(scope, receive, self._guesses)
            if not session:  # nothing behind the door is theirs, and no session is begun without the token
                return self._enter(scope, False)
        elif not _is_from_here(scope, headers):
            return PlainTextResponse(NOT_HERE, 403)
        if path == "/leave" and is_post:
            return self._left(scope)
        if not session:
            session = scope["filao_session"] = _new_session("")
        scope["filao_visitor"] = Visitor(who, self._sign(f"proof {session}"), self._guesses is not None)
        return None

    async def _admitted(self, admit: Admit, scope: Scope) -> str | None:
        """Return the name of the user whom the application admits.

        Only a text that is not empty is a name: `False` of a user who is no administrator lets nobody in, nor does the
        empty name of one who has not logged in.
        """
        found: object = admit(scope)
        if isawaitable(found):
            async with asyncio.timeout(ADMITTED_WITHIN):
                found = await found
        if isinstance(found, str):
            return printable(found.strip()) or None
        if found is not None and found is not False and not self._has_complained:
            self._has_complained = True
            log.error("admit returned %s, so nobody is let in: it must return the user's name, or None", shown(found))
        return None

    def _keeping(self, scope: Scope, send: Send) -> Send:
        """Return a send that has the browser keep the session that was begun, if one was."""
        session = scope.get("filao_session")
        return send if session is None else safely(send, {"set-cookie": self._kept(scope, session)})

    async def _try(self, scope: Scope, receive: Receive, guesses: Guesses) -> Response:
        try:
            form = await read_form(receive, ENTER_MAX)
            is_right = await guesses.is_right(client_of(scope), form.get("token", "").strip())
        except FormError as error:
            return PlainTextResponse(error.text, error.status)
        except TooOftenError as error:
            return PlainTextResponse(str(error), 429)
        if not is_right:
            return self._enter(scope, True)
        kept = self._kept(scope, _new_session(form.get("name", "")))
        query = QueryParams(scope["query_string"])
        language, to = query.get("language"), query.get("to", "")
        if not OUR_PAGE.fullmatch(to):
            to = f"/{language}/queues" if language in LANGUAGES else "/"
        return RedirectResponse(f"{prefix_of(scope)}{to}", 303, {"set-cookie": kept})

    def _kept(self, scope: Scope, session: str) -> str:
        """Return the header that has a browser keep a session."""
        response = Response()
        speaks_tls = "https" in (scope.get("scheme"), Headers(scope=scope).get("x-forwarded-proto"))
        response.set_cookie(
            self._cookie,
            f"{session}.{self._sign(session)}",
            max_age=SESSION_LASTS,
            path=prefix_of(scope) or "/",
            httponly=True,
            samesite="strict",
            secure=speaks_tls,
        )
        return response.headers["set-cookie"]

    def _left(self, scope: Scope) -> Response:
        root = prefix_of(scope)
        response = RedirectResponse(f"{root}/", 303)
        response.delete_cookie(self._cookie, path=root or "/", httponly=True, samesite="strict")
        return response

    def _session(self, cookie: str) -> str:
        """Return the session in a cookie; empty when its signature is wrong or the session is over."""
        body, _, signature = cookie.rpartition(".")
        if not body or not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return ""
        until = body.split(".")[1]
        return body if time.time() < int(until) else ""

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


async def read_form(receive: Receive, most: int = FORM_MAX) -> dict[str, str]:
    """Return the fields of a form of at most so many bytes, and of each its first value.

    Raises `FormError` when it is too large, or did not arrive whole: even half a number is a number.
    """
    content, size, more = bytearray(), 0, True
    try:
        async with asyncio.timeout(FORM_WITHIN):
            while more and size <= FORM_DRAINED:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise FormError("form_unreadable", most)
                body = message.get("body", b"")
                size += len(body)
                if size <= most:
                    content += body
                more = message.get("more_body", False)
        if size > most:
            raise FormError("form_too_large", most)
        fields = parse_qs(content.decode(), keep_blank_values=True, max_num_fields=50, errors="strict")
    except (TimeoutError, ValueError) as error:
        raise FormError("form_unreadable", most) from error
    return {name: values[0] for name, values in fields.items()}


def is_loopback_only(hosts: Collection[str] | None) -> bool:
    """Return whether these are only names of the machine itself."""
    return hosts is not None and set(hosts) <= set(LOOPBACK)


def _new_session(name: str) -> str:
    """Return a session for a cookie: something random, when it ends, and the name that the user gave."""
    called = base64.urlsafe_b64encode(printable(name.strip())[:NAME_MAX].encode(errors="replace")).decode().rstrip("=")
    return f"{secrets.token_urlsafe(18)}.{int(time.time()) + SESSION_LASTS}.{called}"


def _named(session: str, client: str) -> str:
    """Return a session's name for the log: the one that was given with the token, or the server's own user."""
    called = session.rpartition(".")[2]
    name = base64.urlsafe_b64decode(called + "=" * (-len(called) % 4)).decode(errors="replace")
    return f"{name or _user()} ({client})"


@cache
def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"


def _is_from_here(scope: Scope, headers: Headers) -> bool:
    """Return whether a request comes from this machine and our own user, and was not passed on by a proxy."""
    client, server = scope.get("client"), scope.get("server")
    if not _is_loopback(client_of(scope)) or any(name.startswith(FORWARDED) for name in headers):
        return False
    return not (client and server and server[1] and is_of_another_user(tuple(client), tuple(server)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
