"""Answers: pages, their live parts as they change, files, and what forms ask for.

Every page is complete without scripts. Its live part can also be requested alone, once or as a stream of events, and is
drawn once for all who look at the same.
"""

import asyncio
import hmac
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from filao.broker import session_of
from filao.dashboard import charts, shown
from filao.dashboard.acts import Act, Doing, bounds, rate_of, storable, unpacked, wanted
from filao.dashboard.door import FormError, Visitor, read_form
from filao.dashboard.jobs import Job, Jobs, TooMuchError
from filao.dashboard.texts import texts
from filao.dashboard.triage import CHOSEN_MAX, LOOKED_AT_MAX
from filao.dashboard.views import Asked, NoMessageError, Views, oldest_age, whole
from filao.dashboard.watch import Course, Look, Watch
from filao.door import is_of_other_site, path_of, prefix_of
from filao.engine import Feature, State
from filao.errors import ConfigurationError, FilaoError, QueueNotFound, UnsupportedFeature
from filao.languages import LANGUAGES, Language, fill
from filao.languages import wanted as wanted_language
from filao.overview import Deed, raised_line

LIVE_FOR = 30.0  # seconds of one stream of events, so that a stopping server waits no longer; the browser asks again
UNREAD_FOR = 30.0  # seconds more for a client that does not read it: the bound of every wait
STREAMS_MAX = 200  # at a time; others are told to come again
DRAWN_MAX = 64  # live parts that are kept until the next look
READ_WITHIN = 5.0  # seconds for reading what one page shows
RECEIVED_WITHIN = 30.0  # seconds for it if messages must be received to be seen: the bound of every wait
AWAY = 503  # the status of a page when the store does not answer, or not in time
COMES_AGAIN = 2  # seconds after which a browser then asks again
ACT_WITHIN = 2.0  # seconds that an answer waits for a deed to end
KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_NAMED: dict[str, Language] = {language: language for language in LANGUAGES}
LINE_ENDS = re.compile("\r\n|\r|\n")  # in a stream of events; an id may hold any of them
NAVIGATION = ("queues", "dead", "processes", "log")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A page to be drawn: its name, and the values of its template."""

    name: str
    values: dict[str, Any]
    status: int = 200


class _Stream(StreamingResponse):
    """A stream of events that ends even if nobody reads it: an event waits until those before it have been sent."""

    def __init__(self, events: AsyncGenerator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._events = events
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):
                async with aclosing(self._events), asyncio.timeout(LIVE_FOR + UNREAD_FOR):
                    await super().__call__(scope, receive, send)
        finally:
            self._ended()


class Pages:
    """The pages of one dashboard. They belong to the event loop that first asks for one."""

    def __init__(self, watch: Watch, views: Views, jobs: Jobs, doing: Doing, *, allow_actions: bool) -> None:
        self._watch, self._views, self._jobs, self._doing = watch, views, jobs, doing
        self._allow_actions = allow_actions
        self._files = {
            file.name: file.read_bytes() for file in (files("filao.dashboard") / "static").iterdir() if file.is_file()
        }
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("filao.dashboard"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._drawn: dict[tuple[str, str], tuple[int, asyncio.Task[str]]] = {}
        self._streams = 0
        self._view: dict[str, Callable[[Asked], Awaitable[dict[str, Any]]]] = {
            "queues": views.queues,
            "queue": views.queue,
            "message": views.message,
            "processes": views.processes,
            "dead": views.dead,
            "log": views.log,
        }

    def application(self) -> Starlette:
        """Return the application that serves the pages."""
        routes = [
            Route("/", self._arrive),
            Route("/static/{name}", self._file),
            Route("/{language}/act", self._ask),
            Route("/{language}/act", self._act, methods=["POST"]),
            Route("/{language}/{page}", self._page),
        ]
        application = Starlette(routes=routes, exception_handlers={404: self._elsewhere})
        application.router.redirect_slashes = False  # it would name the scheme, which a proxy may have changed
        return application

    def enter(self, scope: Scope, is_wrong: bool) -> Response:  # noqa: FBT001  # the door's callback
        """Return the page that asks for the token, or a file that it is drawn with."""
        path = path_of(scope)
        if path.startswith("/static/"):
            return self._file_named(path.removeprefix("/static/"))
        request = Request(scope)
        language = self._language(request)
        is_form = scope["method"] == "POST"
        query = request.url.query
        asked = "" if is_form else path + (f"?{query}" if query else "")
        to = request.query_params.get("to", "") if is_wrong else asked
        is_over = is_form and not is_wrong  # a form of a session that has ended
        values = {"is_wrong": is_wrong, "is_over": is_over, "to": to}
        return self._drawn_whole(request, language, Look(), Sheet("enter", values, 401))

    # --- pages -------------------------------------------------------------------------------------------------------

    async def _arrive(self, request: Request) -> Response:
        return RedirectResponse(f"{prefix_of(request.scope)}/{self._language(request)}/queues", 303)

    async def _elsewhere(self, request: Request, _error: Exception) -> Response:
        """Answer for a path without a page: redirect to the one that was meant, or say that there is none."""
        match path_of(request.scope).strip("/").split("/"):
            case [word] if word in LANGUAGES or word in ("enter", "leave"):
                return await self._arrive(request)
            case [language, page] if language in LANGUAGES and page in self._view:
                query = request.url.query
                to = f"{prefix_of(request.scope)}/{language}/{page}"
                return RedirectResponse(to + (f"?{query}" if query else ""), 303)
            case _:
                return await self._no_page(request)

    async def _no_page(self, request: Request) -> Response:
        look = await self._watch.latest()
        return self._drawn_whole(request, self._language(request), look, Sheet("trouble", {"what": "no_page"}, 404))

    async def _file(self, request: Request) -> Response:
        return self._file_named(request.path_params["name"])

    def _file_named(self, name: str) -> Response:
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
        if kind is None or name not in self._files:
            return PlainTextResponse("There is no such file.\n", 404)
        return Response(self._files[name], headers={"content-type": kind})

    async def _page(self, request: Request) -> Response:
        page, language = request.path_params["page"], request.path_params["language"]
        if page not in self._view or language not in LANGUAGES:
            return await self._no_page(request)
        live = request.query_params.get("live")
        if live == "stream":
            return self._stream(request, language, page)
        look = await self._watch.latest()
        job = self._jobs.of(whole(request.query_params.get("job", "")))
        if job is not None and job.ended > look.began:  # a page that says so must also show its result
            look = await self._watch.anew()
        if live is not None:
            return HTMLResponse(await self._live(request, language, page, look))
        sheet = await self._sheet(request, page, look)
        if sheet.status == HTTPStatus.NOT_FOUND:  # perhaps it was declared since that look
            look = await self._watch.anew()
            sheet = await self._sheet(request, page, look)
        return self._drawn_whole(request, language, look, sheet)

    async def _sheet(self, request: Request, page: str, look: Look) -> Sheet:
        """Return what a page shows, or the page that says why it cannot."""
        within = READ_WITHIN if Feature.PEEK in self._watch.broker.features else RECEIVED_WITHIN
        try:
            async with asyncio.timeout(within):
                values = await self._view[page](Asked(look, storable(request.query_params)))
                number = whole(request.query_params.get("job", ""))
                job = await self._jobs.told(number)
                return Sheet(page, values | {"job": job, "is_job_unknown": number > 0 and job is None})
        except (QueueNotFound, NoMessageError) as error:
            if look.seen_at is None:  # no look has succeeded yet: the queue may be there
                return Sheet("trouble", {"what": "unseen"}, AWAY)
            return Sheet("trouble", {"what": "not_there", "why": str(error)}, 404)
        except UnsupportedFeature as error:  # an engine of somebody's own, which shows no messages
            return Sheet("trouble", {"what": "not_there", "why": str(error)}, 404)
        except ConfigurationError as error:  # the message behind which a list should go on has gone
            return Sheet("trouble", {"what": "gone", "why": str(error)}, 410)
        except TimeoutError:
            return Sheet("trouble", {"what": "slow", "seconds": within}, AWAY)
        except FilaoError as error:
            return Sheet("trouble", {"what": "away", "why": str(error)}, AWAY)

    def _language(self, request: Request) -> Language:
        """Return the language of the page, or of the form's page, or of the browser."""
        page = path_of(request.scope).lstrip("/").partition("/")[0]
        said = _NAMED.get(page) or _NAMED.get(request.query_params.get("language", ""))
        return said or wanted_language(request.headers.get("accept-language", ""))

    # --- live parts --------------------------------------------------------------------------------------------------

    def _stream(self, request: Request, language: Language, page: str) -> Response:
        if self._streams >= STREAMS_MAX:
            return PlainTextResponse("Too many pages are open.\n", 503, {"retry-after": "10"})
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        self._streams += 1  # here, not when it begins to tell: a thousand who ask at once are counted before that
        return _Stream(self._events(request, language, page), self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _events(self, request: Request, language: Language, page: str) -> AsyncGenerator[str]:
        """Yield the live part of a page whenever it has changed."""
        until, drawn = time.monotonic() + LIVE_FOR, ""
        look = await self._watch.latest()
        yield "retry: 1000\n\n"
        while not self._watch.is_closed and (left := until - time.monotonic()) > 0:
            now = await self._live(request, language, page, look)
            if now != drawn:
                yield "".join(f"data: {line}\n" for line in LINE_ENDS.split(now)) + "\n"
            drawn = now
            look = await self._watch.after(look.number, left)

    async def _live(self, request: Request, language: Language, page: str, look: Look) -> str:
        """Return the live part of a page; all who look at the same share one drawing."""
        key = (
            request.scope["path"],
            urlencode([(name, value) for name, value in request.query_params.items() if name != "live"]),
        )
        number, drawing = self._drawn.get(key, (-1, None))
        if drawing is None or number != look.number:
            while len(self._drawn) >= DRAWN_MAX:
                del self._drawn[next(iter(self._drawn))]
            drawing = asyncio.create_task(self._draw(request, language, page, look))
            self._drawn[key] = (look.number, drawing)
        return await asyncio.shield(drawing)

    async def _draw(self, request: Request, language: Language, page: str, look: Look) -> str:
        sheet = await self._sheet(request, page, look)
        name = "live/trouble.html" if sheet.name == "trouble" else f"live/{page}.html"
        return self._render(name, request, language, look, sheet)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def _drawn_whole(self, request: Request, language: Language, look: Look, sheet: Sheet) -> Response:
        headers = {"refresh": f"{COMES_AGAIN}"} if sheet.status == AWAY else None
        return HTMLResponse(self._render(f"{sheet.name}.html", request, language, look, sheet), sheet.status, headers)

    def _render(self, template: str, request: Request, language: Language, look: Look, sheet: Sheet) -> str:
        root = prefix_of(request.scope)
        visitor: Visitor | None = request.scope.get("filao_visitor")
        said, features = texts(language), self._watch.broker.features
        counts = Feature.COUNTERS in features

        def t(key: str, **values: object) -> str:
            return fill(language, said[key], values)

        def href(page: str, **query: object) -> str:
            given = {name: value for name, value in query.items() if value not in (None, "")}
            return f"{root}/{language}/{page}" + (f"?{urlencode(given)}" if given else "")

        other: Language = "fr" if language == "en" else "en"
        asked = [(name, value) for name, value in request.query_params.items() if name != "live"]
        live = urlencode([*asked, ("live", "stream")])
        path = path_of(request.scope).lstrip("/").partition("/")[2] or "queues"
        return self._templates.get_template(template).render(
            **{"why": "", "what": "", "seconds": 0, "is_job_unknown": False, **sheet.values},
            t=t,
            has_text=said.__contains__,
            about=partial(_about, language),
            href=href,
            n=partial(shown.number, language),
            age=partial(shown.age, language),
            ago=partial(shown.since, language, look.now()),
            ago_here=partial(shown.since, language, datetime.now(UTC)),
            at=shown.instant,
            text=shown.lines,
            raised_line=raised_line,
            oldest_age=oldest_age,
            course_of=self._course,
            spark=partial(self._spark, t),
            chart=partial(self._chart, t, partial(shown.number, language)),
            pack=_packed,
            page=sheet.name,
            navigation=NAVIGATION,
            root=root,
            language=language,
            other=f"{root}/{other}/{path}" + (f"?{urlencode(asked)}" if asked else ""),
            live=f"?{live}",
            look=look,
            is_served=self._watch.is_served,
            visitor=visitor,
            may_act=self._allow_actions,
            states=tuple(State) if counts else (State.READY, State.DEAD),
            counts=counts,
            engine=session_of(self._watch.broker).engine.name,
            may_pause=Feature.PAUSE in features,
            has_groups=Feature.GROUPS in features,
            jobs=self._shown_jobs(request, sheet.values.get("job")),
        )

    def _shown_jobs(self, request: Request, asked_for: Job | None) -> list[Job]:
        """Return the jobs that go on, and the one that this page was asked for."""
        asked_for = asked_for or self._jobs.of(whole(request.query_params.get("job", "")))
        running = self._jobs.running()
        return running if asked_for is None or asked_for in running else [asked_for, *running]

    def _course(self, name: str) -> Course:
        return self._watch.courses.get(name, Course())

    def _spark(self, t: Callable[..., str], name: str) -> Markup:
        return charts.sparkline(self._course(name).depth, t("spark_says"))

    def _chart(self, t: Callable[..., str], n: Callable[[float], str], name: str, what: str) -> Markup:
        course = self._course(name)
        if what == "depth":
            return charts.chart([("depth", course.depth)], t("depth_says"), n(int(max(course.depth, default=0.0))))
        highest = max(*course.rate_in, *course.rate_out, 0.0, 0.0)
        lines = [("in", course.rate_in), ("out", course.rate_out)]
        return charts.chart(lines, t("rates_say"), f"{n(highest)}/s")

    # --- what forms ask for ------------------------------------------------------------------------------------------

    async def _ask(self, request: Request) -> Response:
        """Ask for a confirmation, at an address: a browser goes back to it, loads it anew, and changes its language.

        No page of another site leads there, because a key that is held down meanwhile would confirm it.
        """
        language, look = self._language(request), await self._watch.latest()
        if request.path_params["language"] not in LANGUAGES:
            return await self._no_page(request)
        if not self._allow_actions:
            return self._drawn_whole(request, language, look, Sheet("trouble", {"what": "read_only"}, 403))
        act = unpacked(request.query_params.get("do", ""))
        if act is None or is_of_other_site(request.headers, is_visit=False):
            return await self._arrive(request)
        if act.what == "edit":  # what was typed is in no address: it is typed anew
            about = urlencode({"queue": act.queue, "id": act.id or ""})
            return RedirectResponse(f"{prefix_of(request.scope)}/{language}/message?{about}", 303)
        return self._drawn_whole(request, language, look, Sheet("confirm", self._asked(act, look, {})))

    async def _act(self, request: Request) -> Response:
        """Do what was confirmed, or ask for it."""
        language = self._language(request)
        look = await self._watch.latest()
        draw = partial(self._drawn_whole, request, language, look)
        visitor: Visitor = request.scope["filao_visitor"]
        try:
            form = await read_form(request.receive)
        except FormError as error:
            return draw(Sheet("trouble", {"what": error.what}, error.status))
        if not self._allow_actions:
            return draw(Sheet("trouble", {"what": "read_only"}, 403))
        is_proven = _is_same(form.get("proof", ""), visitor.proof)
        if not is_proven and "stop" in form:  # a job of an earlier run has ended with that run
            return draw(Sheet("trouble", {"what": "forged"}, 403))
        if stopped := whole(form.get("stop", "")):
            self._jobs.stop(stopped)
            return RedirectResponse(f"{prefix_of(request.scope)}/{language}/dead?job={stopped}", 303)
        act = unpacked(form.get("do", ""))
        if act is None:
            return draw(Sheet("trouble", {"what": "no_act"}, 400))
        values = self._asked(act, look, form)
        if not is_proven:  # perhaps drawn before a restart of the dashboard: ask again, and keep what was typed
            return draw(Sheet("confirm", values | {"wrong": texts(language)["confirm_anew"]}, 403))
        if form.get("confirmed") != "yes":
            return draw(Sheet("confirm", values))
        try:
            deed = self._doing.deed(act, visitor.who, values["how_many"])
            return await self._done(request, language, act, form, deed)
        except TooMuchError:
            return draw(Sheet("trouble", {"what": "too_much"}, 429))
        except FilaoError as error:
            return draw(Sheet("confirm", values | {"wrong": str(error)}, 400))

    async def _done(self, request: Request, language: Language, act: Act, form: dict[str, str], deed: Deed) -> Response:
        """Begin an act, wait a moment for its end, and redirect to a page that shows how far it is."""
        if act.what == "purge" and form.get("name", "").strip() != act.queue:
            raise ConfigurationError(texts(language)["purge_name_wrong"])
        rate = rate_of(form.get("rate", "")) if act.what in ("redrive", "discard") else None
        body = form.get("body", "")
        if act.what == "edit":
            self._doing.checked(act.queue, body)  # before it is written into the log

        async def work(job: Job) -> None:
            try:
                await self._doing.do(act, body, rate, job)
            finally:
                self._views.triage.forget(act.queue)

        job = await self._jobs.begin(deed, work)
        if job.task is not None:
            await asyncio.wait([job.task], timeout=ACT_WITHIN)
        await self._watch.anew()
        page = "dead" if act.what in ("redrive", "discard", "edit") else "queue"
        query = urlencode({"job": job.number} if page == "dead" else {"name": act.queue, "job": job.number})
        return RedirectResponse(f"{prefix_of(request.scope)}/{language}/{page}?{query}", 303)

    def _asked(self, act: Act, look: Look, form: Mapping[str, str]) -> dict[str, Any]:
        """Return what the page shows that asks for a confirmation, with what was typed there before."""
        queue = look.queues.get(act.queue)
        kind = self._views.triage.count(act.queue, act.reason or "", act.error or "")
        return {
            "act": act,
            "bounds": bounds(act, queue),
            "looked_at_max": LOOKED_AT_MAX,
            "chosen_max": CHOSEN_MAX,
            "how_many": wanted(act, queue, kind),
            "wrong": "",
            "body": form.get("body", ""),
            "rate": form.get("rate", ""),
        }


def _about(language: Language, deed: Deed) -> str:
    """Return in words which part of its queue a deed was about; the log has the reason of a kind by its name."""
    said, (reason, is_kind, error) = texts(language), deed.about.partition(": ")
    says = said.get(f"reason_{reason}") if is_kind else None
    return deed.about if says is None else fill(language, said["about_kind"], {"reason": says, "error": error})


def _packed(what: str, queue: str, **about: str) -> str:
    return Act(what, queue, **about).packed()


def _is_same(given: str, proof: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), proof.encode())
