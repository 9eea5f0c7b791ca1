"""The sandbox's web server: it gives every browser a room of its own, and lets in only whom it should.

It listens on loopback, or anywhere else if who comes must show a token. Requests whose `Host` or `Origin` is another site's are
refused, so that no page of the web can reach a sandbox through its visitor's browser.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (NiceGUI leaves some of its types open)

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable
from http.cookies import SimpleCookie
from importlib.resources import as_file, files
from urllib.parse import parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI, Request
from nicegui import app as pages
from nicegui import ui
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from filao.sandbox.texts import LANGUAGES, Language
from filao.sandbox.web.page import Page
from filao.sandbox.web.visits import ROOMS_MAX, NoRoomError, Visits, own_folder
from filao.sandbox.web.words import wanted, words

TOKEN_COOKIE = "filao_token"  # noqa: S105  # its name
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SWEEP_EVERY = 1.0  # seconds between two looks for rooms that nobody is in any more
ENDS_WITHIN = 2  # seconds for connections to close
STYLE = files("filao.sandbox.web") / "components" / "style.css"


class Doorkeeper:
    """Lets in who comes from this machine's own pages, or shows the token."""

    def __init__(self, inner: ASGIApp, token: str | None) -> None:
        self._inner = inner
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self._inner(scope, receive, send)
            return
        headers = Headers(scope=scope)
        why = self._why_not(scope, headers)
        if not why:
            await self._inner(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": why})
        elif self._token is not None and self._given(scope) == "query":
            response = RedirectResponse(scope["path"])
            response.set_cookie(TOKEN_COOKIE, self._token, httponly=True, samesite="strict")
            await response(scope, receive, send)
        else:
            await PlainTextResponse(why, 403)(scope, receive, send)

    def _why_not(self, scope: Scope, headers: Headers) -> str:
        host = _name(f"//{headers.get('host', '')}")
        if self._token is None and host not in LOOPBACK:
            return "This sandbox answers to 127.0.0.1 and localhost only."
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return "This sandbox does not answer to pages of other sites."
        if self._token is not None and self._given(scope) != "cookie":
            return "This sandbox asks for a token: open the address that it printed, which ends with ?token=…"
        return ""

    def _given(self, scope: Scope) -> str:
        """Return where the right token was given: cookie, query, or nowhere."""
        assert self._token is not None
        cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        cookie = cookies[TOKEN_COOKIE].value if TOKEN_COOKIE in cookies else ""
        query = parse_qs(scope.get("query_string", b"").decode(errors="replace")).get("token", [""])[0]
        if hmac.compare_digest(cookie.encode(), self._token.encode()):
            return "cookie"
        return "query" if hmac.compare_digest(query.encode(), self._token.encode()) else ""


def serve(listening: socket.socket, token: str | None, opened: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; `opened` is called once pages are answered. No file and no process is left."""
    with own_folder() as folder, as_file(STYLE) as style:
        visits = Visits(folder)
        web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        ui.add_css(style.read_text(encoding="utf-8"), shared=True)
        _declare_pages(visits)

        async def sweep() -> None:
            opened()
            while True:
                await asyncio.sleep(SWEEP_EVERY)
                await visits.close_those_over()

        pages.on_startup(sweep)
        pages.on_shutdown(visits.close)
        ui.run_with(
            web,
            title="Filao",
            favicon="📬",
            dark=None,
            tailwind=False,
            show_welcome_message=False,
            storage_secret=secrets.token_hex(),
            gzip_middleware_factory=None,
        )
        config = uvicorn.Config(
            Doorkeeper(web, token), log_level="warning", timeout_graceful_shutdown=ENDS_WITHIN, lifespan="on"
        )
        uvicorn.Server(config).run(sockets=[listening])


def _declare_pages(visits: Visits) -> None:
    async def show(language: Language) -> None:
        ui.context.client.content.classes("page")
        try:
            visit = await visits.of(pages.storage.browser["id"])
        except NoRoomError:
            ui.label(words(language)["error_rooms"].format(most=ROOMS_MAX)).classes("banner").props("role=alert")
            return
        page = Page(visit, language)
        visit.enter()
        ui.context.client.on_delete(visit.leave)
        page.build()
        await ui.context.client.connected()
        await page.restore()

    for language in LANGUAGES:

        @ui.page(f"/{language}", title=words(language)["title"], language="en-US" if language == "en" else "fr")
        async def learn(language: Language = language) -> None:
            await show(language)

    @ui.page("/")
    def arrive(request: Request) -> RedirectResponse:
        return RedirectResponse(f"/{wanted(request.headers.get('accept-language', ''))}")


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
