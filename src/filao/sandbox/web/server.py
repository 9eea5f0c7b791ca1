"""The sandbox's web server: a page in each language, its modules and styles, and a socket for scenes and events.

A room begins when a page's socket connects, not with a request for the page. Every scene is complete: a page that
missed some draws the next.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from filao.errors import FilaoError
from filao.languages import Language, wanted
from filao.sandbox.room import READY_WITHIN, RoomError
from filao.sandbox.visits import ROOMS_MAX, NoRoomError, Visit, Visits, own_folder
from filao.sandbox.web.door import Door
from filao.sandbox.web.events import handle
from filao.sandbox.words import page_words
from filao.worker.signals import HANGUP

DRAW_EVERY = 0.1  # seconds between two scenes
SWEEP_EVERY = 1.0  # seconds between two looks for rooms that nobody is in any more
ENDS_WITHIN = 2  # seconds for connections to close
EVENT_MAX = 2_000_000  # bytes
AT_ONCE = 8  # events of one page that are handled at the same time
STATIC = files("filao.sandbox.web") / "static"
KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}

log: logging.Logger = logging.getLogger("filao.sandbox")


def serve(
    listening: socket.socket,
    token: str,
    opened: Callable[[str], None],
    *,
    open_to_others: bool,
    may_run_code: bool,
    speed: float,
) -> None:
    """Serve until a signal ends it; `opened` is called with the folder once pages are answered. Nothing is left."""
    with own_folder() as folder:
        visits = Visits(folder, speed)

        @asynccontextmanager
        async def living(_: Starlette) -> AsyncGenerator[None]:
            sweeping = asyncio.create_task(_sweep(visits))
            opened(str(folder))
            try:
                yield
            finally:
                sweeping.cancel()
                await asyncio.wait((sweeping,))
                await visits.close()

        house = _House(visits, may_run_code=may_run_code)
        web = Starlette(routes=house.routes(), lifespan=living)
        config = uvicorn.Config(
            Door(web, token, open_to_others=open_to_others),
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=ENDS_WITHIN,
            lifespan="on",
            ws="websockets-sansio",
            ws_max_size=EVENT_MAX,
            ws_per_message_deflate=open_to_others,  # to compress a scene costs more than to make it: for networks only
            server_header=False,
        )
        _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ignores all signals after the first: a second Ctrl-C would cut off the closing of the rooms."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Hear SIGHUP too, where it would raise an exception in the midst of whatever runs."""
        with super().capture_signals():
            before = None if HANGUP is None else signal.getsignal(HANGUP)
            if HANGUP is None or not callable(before):
                yield
                return
            signal.signal(HANGUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(HANGUP, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            super().handle_exit(sig, frame)


async def _sweep(visits: Visits) -> None:
    """Close the rooms that nobody is in any more; an error in one round does not prevent the next."""
    while True:
        await asyncio.sleep(SWEEP_EVERY)
        try:
            await visits.close_those_over()
        except Exception as error:
            log.warning("closing a room failed: %r", error)


class _House:
    """The pages, the files and the socket."""

    def __init__(self, visits: Visits, *, may_run_code: bool) -> None:
        self._visits = visits
        self._may_run_code = may_run_code
        self._files = {file.name: file.read_bytes() for file in STATIC.iterdir() if file.is_file()}
        self._page = self._files["page.html"].decode()

    def routes(self) -> list[Route | WebSocketRoute]:
        """Return the routes."""
        return [
            Route("/", self._arrive),
            Route("/en", self._learn),
            Route("/fr", self._learn),
            Route("/static/{name}", self._file),
            WebSocketRoute("/socket", self._socket),
        ]

    async def _arrive(self, request: Request) -> Response:
        return RedirectResponse(f"/{wanted(request.headers.get('accept-language', ''))}", 303)

    async def _learn(self, request: Request) -> Response:
        language: Language = "fr" if request.url.path == "/fr" else "en"
        told: dict[str, Any] = page_words(language)
        told |= {"python": sys.executable, "may_run_code": self._may_run_code}
        text = msgspec.json.encode(told).decode().replace("<", "\\u003c")
        page = self._page.replace("{language}", language).replace("{title}", told["words"]["title"])
        return HTMLResponse(page.replace("{told}", text))

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
        if kind is None or name not in self._files:
            return Response(status_code=404)
        return Response(self._files[name], headers={"content-type": kind})

    async def _socket(self, page: WebSocket) -> None:
        """Send scenes to a page and handle its events until it goes. A wrong event does not close the socket."""
        await page.accept()
        try:
            visit = await self._visits.of(page.scope["filao_session"])
        except NoRoomError:
            await _tell(page, {"note": {"key": "rooms", "values": {"most": ROOMS_MAX}}})
            await page.close()
            return
        visit.enter()
        try:
            await _Sitting(page, visit, may_run_code=self._may_run_code).last()
        finally:
            visit.leave()


class _Sitting:
    """One page before one room, while its socket is open."""

    def __init__(self, page: WebSocket, visit: Visit, *, may_run_code: bool) -> None:
        self._page = page
        self._visit = visit
        self._may_run_code = may_run_code
        self._claim = 0  # whose story the page tells
        self._known = 0  # the last move that it has
        self._doing: set[asyncio.Task[None]] = set()

    async def last(self) -> None:
        """Draw and listen until the page goes, then finish what it has begun: it may only be loading anew."""
        drawing = asyncio.create_task(self._draw())
        try:
            await self._listen()
            await _to_their_end(self._doing)
        finally:
            for task in (drawing, *self._doing):
                task.cancel()
            await asyncio.wait((drawing, *self._doing))

    async def _draw(self) -> None:
        shown: Any = None
        while True:
            scene = self._visit.shown(known=self._known, claim=self._claim)
            if scene["moves"]:
                self._known = scene["moves"][-1]["n"]
            if scene != shown:
                await _tell(self._page, {"scene": scene})
            shown = scene
            await asyncio.sleep(DRAW_EVERY)

    async def _listen(self) -> None:
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                text = await self._page.receive_text()
                with contextlib.suppress(msgspec.MsgspecError, UnicodeError, RecursionError):
                    self._begin(decode(text))
                if len(self._doing) >= AT_ONCE:  # further events wait in the socket: none is lost
                    await asyncio.wait(self._doing, return_when=asyncio.FIRST_COMPLETED)

    def _begin(self, asked: dict[str, Any]) -> None:
        if asked.get("do") == "story":
            claim = asked.get("claim")
            self._claim = claim if type(claim) is int and 0 <= claim < 2**53 else 0
        else:
            task = asyncio.create_task(self._do(asked))
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)

    async def _do(self, asked: dict[str, Any]) -> None:
        """Handle one event. When it cannot be done, tell the page why."""
        try:
            await handle(self._visit, asked, may_run_code=self._may_run_code)
        except RoomError as error:
            await _tell(self._page, {"note": {"key": error.key, "values": error.values}})
        except FilaoError as error:
            await _tell(self._page, {"note": {"key": "failed", "values": {"why": str(error)}}})
        except WebSocketDisconnect:
            pass
        except Exception as error:
            log.warning("an event of a page failed: %r", error)
            await _tell(self._page, {"note": {"key": "failed", "values": {"why": type(error).__name__}}})


async def _to_their_end(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for tasks, at most as long as one waits for consumers to start."""
    if tasks:
        await asyncio.wait(tasks, timeout=READY_WITHIN)


async def _tell(page: WebSocket, what: dict[str, Any]) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # the page has just gone
        await page.send_text(msgspec.json.encode(what).decode())
