"""The dashboard over HTTP: whom it lets in, what its pages tell, and what its forms do."""

import asyncio
import json
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from html import unescape
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import click
import httpx
import psycopg
import pytest
from msgspec import structs
from starlette.applications import Starlette
from starlette.routing import Mount

import filao
import filao.sync
from filao import door
from filao.cli import commands
from filao.dashboard import app, pages, views
from filao.dashboard import jobs as module_of_jobs
from filao.dashboard import watch as module_of_watch
from filao.dashboard.acts import Act
from filao.dashboard.door import FormError, read_form
from filao.dashboard.jobs import REMEMBERED_MAX, RUNNING_MAX, Job, Jobs, TooMuchError, in_slices
from filao.dashboard.neighbours import is_of_another_user
from filao.dashboard.texts import FOLDER, texts
from filao.dashboard.triage import dead_letters
from filao.engine import StoredMessage
from filao.engines.sqlite.backup import restore
from filao.overview import Deed, Overview, error_kind
from filao.slices import Tally
from filao.testing import Clock
from tests.conftest import engine_of, on_connection
from tests.support.memory import MemoryEngine, Store
from tests.support.proxy import Proxy
from tests.support.servers import Postgres
from tests.support.visitor import HOST, PATIENCE, Visitor, rows, visiting

pytestmark = pytest.mark.anyio

TOKEN = "correct-horse-battery"


@pytest.fixture(params=["sqlite"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[filao.Broker]:
    """Return a broker on SQLite; on PostgreSQL too where its SQL differs."""
    url = str(tmp_path / "claims.db")
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.create(f"dashboard{next(_databases)}")
    async with filao.connect(url) as opened:
        await opened.declare(filao.Queue("claims", max_attempts=1), filao.Queue("letters", group_dead="halt"))
        yield opened


_databases = count()
on_both = pytest.mark.parametrize("broker", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
async def visitor(broker: filao.Broker) -> AsyncGenerator[Visitor]:
    async with visiting(broker, allow_actions=True) as somebody:
        yield somebody


@dataclass(frozen=True)
class Dated:
    on: datetime


async def die(broker: filao.Broker, errors: Mapping[Any, Exception | str], queue: str = "claims") -> None:
    """Send a message for each body, and let it die of its error."""
    for body, error in errors.items():
        await broker.send_to_queue(queue, body)
        message = await broker.receive_from_queue(queue)
        await message.reject(error)


FOUR_KINDS: dict[str, Exception | str] = {
    "a": ValueError("bad amount 1"),
    "b": ValueError("bad amount 2"),
    "c": KeyError("policy"),
    "d": "claim 4 is a duplicate",
    "e": "claim 5 is a duplicate",
    "f": "claim 6 is a duplicate",
    "g": RuntimeError("no answer"),
}


async def test_of_an_engine_of_somebodys_own_it_shows_the_queues_and_says_what_it_cannot_show() -> None:
    async with filao.connect(lambda: MemoryEngine(Store())) as broker:
        await broker.declare(filao.Queue("claims"))
        async with visiting(broker) as visitor:
            assert "claims" in await visitor.sees("/en/queues")
            for path in ("/en/queue?name=claims", "/en/message?queue=claims&id=1", "/en/processes", "/en/log"):
                assert "a dictionary shows nothing to the dashboard" in await visitor.sees(path, 404)


# --- the door --------------------------------------------------------------------------------------------------------


async def test_without_a_token_it_answers_to_its_own_machine_alone(broker) -> None:
    async with visiting(broker, client="10.0.0.7") as stranger:
        assert (await stranger.client.get("/en/queues")).status_code == 403
    async with visiting(broker) as proxied:
        await proxied.sees("/en/queues")
        for header in (
            "X-Forwarded-For",
            "X-Forwarded-Host",
            "X-Forwarded-Proto",
            "Forwarded",
            "CF-Connecting-IP",
            "Via",
        ):
            assert (await proxied.client.get("/en/queues", headers={header: "x"})).status_code == 403, header
    async with visiting(broker, host="http://evil.example") as rebound:
        assert (await rebound.client.get("/en/queues")).status_code == 403


def test_another_user_of_the_machine_is_told_from_ones_own() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.create_server((host, 0), family=family) as listening:
            address = listening.getsockname()[:2]
            for user, is_another in ((65_534, True), (0, False)):
                command = ["bash", "-c", f"exec 3<>/dev/tcp/{host}/{address[1]}; read <&3"]
                with subprocess.Popen(command, user=user) as client:
                    connection, end = listening.accept()
                    with connection:
                        assert is_of_another_user(end[:2], address) is is_another
                    client.wait()
        assert not is_of_another_user((host, 1), (host, 2))


async def test_who_could_come_in_from_elsewhere_unasked_is_a_mistake() -> None:
    broker = filao.connect("sqlite://:memory:")
    for how in (
        {"hosts": None},
        {"hosts": ("ops.example",)},
        {"token": "short"},
        {"token": TOKEN, "admit": lambda _: ""},
    ):
        with pytest.raises(filao.ConfigurationError):
            app(broker, **how)


async def test_a_host_that_no_request_is_sent_to_is_a_mistake() -> None:
    """All were turned away, and told the very name that they had asked for."""
    broker = filao.connect("sqlite://:memory:")
    odd = (
        "ops.example:8748",
        "https://ops.example",
        "ops.example/queues",
        "[::1]",
        "ada@ops.example",
        "",
        "h\u00e9.example",
    )
    for hosts in ("ops.example", *([one] for one in odd)):
        with pytest.raises(filao.ConfigurationError, match="hosts"):
            app(broker, token=TOKEN, hosts=hosts)
    app(
        broker,
        token=TOKEN,
        queues=(filao.Queue("claims"),),
        hosts=["Ops.Example", "10.0.0.7", "::1", "2001:DB8::7", "ops.example."],
    )


def test_what_the_first_request_would_fail_for_is_refused_when_it_is_given(tmp_path) -> None:
    broker = filao.connect("sqlite://:memory:")
    others: list[Any] = [filao.sync.connect(tmp_path / "claims.db"), str(tmp_path / "claims.db")]
    for given in others:
        with pytest.raises(filao.ConfigurationError, match=r"filao\.connect"):
            app(given)
    some: list[Any] = [["claims"], "claims", [None]]
    for queues in some:
        with pytest.raises(filao.ConfigurationError, match=r"a list of filao\.Queue"):
            app(broker, queues=queues)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--redact", "broken:redact"), r"'broken' cannot be imported: NameError: .*nothing"),
        (("--redact", "nowhere.at.all:redact"), "no module 'nowhere.at.all' here"),
        (("--redact", "whole:text"), "is no function that returns a message at once"),
        (("--redact", "whole:later"), "is no function that returns a message at once"),
        (("--redact", "whole:none"), "there is no 'none' in 'whole'"),
        (("--type", "whole:nothing"), r"None is no filao\.Queue"),
    ],
)
def test_a_module_that_cannot_be_used_is_told_in_one_line_behind_its_own_traceback(
    tmp_path, monkeypatch, capsys, options, said
) -> None:
    """As with `filao work`: ours told where the command line is, which mends nothing."""
    (tmp_path / "broken.py").write_text("nothing.at(all)\n")
    (tmp_path / "whole.py").write_text("text, nothing = 'x', None\n\n\nasync def later(message): ...\n")
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("broken", "whole"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(click.UsageError, match=said):
        commands.main(["dashboard", "claims.db", *options], prog_name="filao", standalone_mode=False)
    trace = capsys.readouterr().err
    assert trace.count('File "') == (1 if "broken" in options[1] else 0)


async def test_a_token_is_asked_for_by_a_form_and_kept_in_a_strict_cookie(broker) -> None:
    async with visiting(broker, token=TOKEN, client="10.0.0.7", hosts=None) as somebody:
        assert "Token" in await somebody.sees("/en/queues", 401)
        assert "Token" in await somebody.sees(f"/en/queues?token={TOKEN}", 401)
        wrong = await somebody.client.post("/enter", data={"token": "correct-horse-batterx"})
        assert (wrong.status_code, wrong.cookies.get("x")) == (401, None)
        right = await somebody.client.post("/enter", data={"token": TOKEN, "name": "Ada"})
        cookie = right.headers["set-cookie"]
        assert right.status_code == 303
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        await somebody.sees("/en/queues")
        await somebody.client.post("/leave")
        await somebody.sees("/en/queues", 401)


@pytest.mark.parametrize(
    ("stranger", "operator"), [("10.0.0.7", "10.0.0.8"), ("2001:db8::7", "2001:db8:0:1::7"), ("::ffff:10.0.0.7", "::1")]
)
async def test_guesses_of_a_stranger_keep_out_nobody_from_elsewhere(broker, monkeypatch, stranger, operator) -> None:
    monkeypatch.setattr(door, "GUESS_COSTS", 60.0)  # seconds, so that all of them wait at once
    async with visiting(broker, token=TOKEN, hosts=None) as somebody:

        async def entering(client: str, token: str) -> int:
            transport = httpx.ASGITransport(somebody.dashboard, client=(client, 40_000))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as visitor:
                return (await visitor.post("/enter", data={"token": token})).status_code

        guessing = [asyncio.create_task(entering(stranger, f"wrong-horse-{number}")) for number in range(17)]
        refused, _ = await asyncio.wait(guessing, return_when=asyncio.FIRST_COMPLETED)
        assert [one.result() for one in refused] == [429]
        assert await entering(operator, TOKEN) == 303
        for one in guessing:
            one.cancel()
        await asyncio.wait(guessing)
        assert await entering(stranger, TOKEN) == 303


async def test_nothing_that_is_to_be_had_without_the_token_lets_anybody_in_or_tells_of_a_queue(broker) -> None:
    """A file, which is everybody's, once came with the cookie of a session."""

    def mounted(dashboard: Any) -> Any:
        return Starlette(routes=[Mount("/ops", dashboard)])

    async with visiting(broker, token=TOKEN, allow_actions=True, wrap=mounted) as somebody:
        asked = [
            *pages_and_files(),
            "/static/nothing.css",
            "/static/a/b",
            "/static/../en/queues",
            "/static/",
            "/static",
        ]
        for method, path in product(("GET", "HEAD", "POST"), asked):
            answer = await somebody.client.request(method, f"/ops{path}")
            assert "set-cookie" not in answer.headers, (method, path)
            assert answer.status_code == 401 or path.startswith("/static/"), (method, path)
            assert not re.search("claims|<nav", answer.text), (method, path)
        await somebody.sees("/ops/en/queues", 401)
        assert "--ground" in await somebody.sees("/ops/static/style.css")


async def test_a_token_that_came_with_a_line_end_is_the_token_without_it(broker) -> None:
    async with visiting(broker, token=f"{TOKEN}\n") as somebody:
        assert (await somebody.client.post("/enter", data={"token": TOKEN})).status_code == 303
        assert (await somebody.client.post("/enter", data={"token": ""})).status_code == 401
    with pytest.raises(filao.ConfigurationError, match="0 characters"):
        app(broker, token=" " * 20)


def pages_and_files() -> list[str]:
    """Return an address of each page and each file."""
    shown = (
        "queues",
        "queue?name=letters",
        "dead",
        "processes",
        "log",
        "message",
        "act",
        "nothing",
        "queues?live=once",
    )
    return ["/", *(f"/en/{page}" for page in shown), "/static/style.css", "/static/live.js", "/static/icon.svg"]


async def test_who_comes_in_keeps_the_language_of_the_page(broker) -> None:
    async with visiting(broker, token=TOKEN) as somebody:
        form = re.search(r'action="(/enter[^"]*)"', await somebody.sees("/fr/queues", 401))
        assert form
        assert "Token" in await somebody.sees("/en/queues", 401)
        for token, status, shown in (("wrong-horse-battery", 401, 'lang="fr"'), (TOKEN, 200, 'lang="fr"')):
            answer = await somebody.client.post(form[1], data={"token": token}, follow_redirects=True)
            assert (answer.status_code, f"<html {shown}" in answer.text) == (status, True)
        odd = await somebody.client.post("/enter?language=/evil.example", data={"token": TOKEN})
        assert odd.headers["location"] == "/"


async def test_who_comes_in_is_led_to_the_page_that_was_asked_for_and_to_none_of_another_site(broker) -> None:
    """An alert links to it, and a strict cookie does not come with a link of another site."""
    asked = "/fr/dead?queue=claims&name=%C3%A9%0D%0A"
    async with visiting(broker, token=TOKEN) as somebody:
        form = re.search(r'action="(/enter[^"]*)"', await somebody.sees(asked, 401))
        assert form
        wrong = await somebody.client.post(form[1], data={"token": "wrong-horse-battery"})
        form = re.search(r'action="(/enter[^"]*)"', unescape(wrong.text))
        assert form
        assert (await somebody.client.post(form[1], data={"token": TOKEN})).headers["location"] == asked
        for elsewhere in ("//evil.example", "https://evil.example/en/dead", "/en//evil.example", "/en/../../x", "\\x"):
            odd = await somebody.client.post(f"/enter?{urlencode({'to': elsewhere})}", data={"token": TOKEN})
            assert odd.headers["location"] == "/", elsewhere


async def test_behind_a_proxy_that_speaks_tls_the_cookie_is_never_sent_without_and_a_lost_host_is_told(broker) -> None:
    async with visiting(broker, token=TOKEN, hosts=["ops.example"], host="http://ops.example") as somebody:
        form = {"token": TOKEN}
        for headers, is_secure in (({}, False), ({"x-forwarded-proto": "https"}, True)):
            answer = await somebody.client.post("/enter", data=form, headers=headers)
            assert ("Secure" in answer.headers["set-cookie"].split("; ")) is is_secure
        answer = await somebody.client.post("/enter", data=form, headers={"origin": "https://ops.example:8443"})
        assert (answer.status_code, "have the proxy pass the header Host on" in answer.text) == (403, True)


async def test_a_cookie_that_was_tampered_with_opens_nothing(broker) -> None:
    async with visiting(broker, token=TOKEN) as somebody:
        await somebody.client.post("/enter", data={"token": TOKEN})
        ((name, value),) = somebody.client.cookies.items()
        random, until, called, _ = value.split(".")
        for forged in (f"{random}.{int(until) + 1}.{called}.{'0' * 64}", "x", "...", value[:-1] + "é"):
            header = {b"cookie": f"{name}={forged}".encode()}
            assert (
                await httpx.AsyncClient(transport=somebody.client._transport).get(f"{HOST}/en/queues", headers=header)
            ).status_code == 401


async def test_a_cookie_is_found_among_those_that_other_programs_left_on_the_host(broker) -> None:
    async with visiting(broker, token=TOKEN) as somebody:
        await somebody.client.post("/enter", data={"token": TOKEN})
        ((name, value),) = somebody.client.cookies.items()
        somebody.client.cookies.clear()
        ours = f"{name}={value}".encode()
        for odd in (b'prefs={"dark": true}', b"a b", b"=", b";;", b"na\xefve=\xff", b"x[y]=1,2"):
            for cookies in (odd + b"; " + ours, ours + b";" + odd):
                answer = await somebody.client.get("/en/queues", headers={b"cookie": cookies})
                assert answer.status_code == 200, cookies


async def test_an_origin_that_is_none_is_refused_like_another_sites(broker) -> None:
    async with visiting(broker) as somebody:
        for origin in ("http://[", "http://a]b", "", "http://127.0.0.1:x"):
            assert (await somebody.client.get("/en/queues", headers={"origin": origin})).status_code == 403, origin


async def test_an_application_admits_whom_it_likes(broker) -> None:
    def admit(scope: Any) -> str | None:
        return dict(scope["headers"]).get(b"x-user", b"").decode() or None

    async with visiting(broker, admit=admit, hosts=None, client="10.0.0.7", allow_actions=True) as somebody:
        assert (await somebody.client.get("/en/queues")).status_code == 403
        somebody.client.headers["x-user"] = "ada"
        await somebody.does(Act("pause", "claims"))
        assert "<td>ada</td>" in await somebody.sees("/en/log")


async def test_who_is_admitted_by_a_coroutine_is_waited_for(broker) -> None:
    async def admit(scope: Any) -> str | None:
        await asyncio.sleep(0)
        return dict(scope["headers"]).get(b"x-user", b"").decode() or None

    async with visiting(broker, admit=admit, hosts=None, client="10.0.0.7") as somebody:
        await somebody.sees("/en/queues", 403)
        somebody.client.headers["x-user"] = "ada"
        await somebody.sees("/en/queues")


@pytest.mark.parametrize(("answer", "complaints"), [(False, 0), (None, 0), ("", 0), (" ", 0), (True, 1), (b"ada", 1)])
async def test_what_is_no_name_lets_nobody_in(broker, caplog, answer, complaints) -> None:
    """`user.is_staff` for one who is not was taken for a name: it is not None."""
    async with visiting(broker, admit=lambda _: answer, hosts=None, client="10.0.0.7") as stranger:
        for _ in range(2):
            await stranger.sees("/en/queues", 403)
    assert len([record for record in caplog.records if "admit returned" in record.getMessage()]) == complaints


async def test_a_forged_request_does_nothing(broker) -> None:
    async with visiting(broker, allow_actions=True) as somebody:
        proof, do = await somebody.proof(), Act("pause", "claims").packed()
        form = {"proof": proof, "do": do, "confirmed": "yes"}
        for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert (await somebody.client.post("/en/act", data=form, headers=headers)).status_code == 403
        assert (await somebody.client.post("/en/act", data=form | {"proof": "0" * 64})).status_code == 403
        somebody.client.cookies.clear()
        assert (await somebody.client.post("/en/act", data=form)).status_code == 403
        assert not (await broker.stats("claims")).paused


async def test_a_form_of_a_page_that_an_earlier_run_has_drawn_is_confirmed_anew_with_nothing_lost(broker) -> None:
    await die(broker, {"a": "bad amount"})
    (letter,) = await broker.dead_letters("claims", limit=1)
    form = {"do": Act("edit", "claims", id=letter.id).packed(), "confirmed": "yes", "body": '"edited <for long>"'}
    async with visiting(broker, allow_actions=True) as before:
        form["proof"] = await before.proof()
        cookies = before.client.cookies
    async with visiting(broker, allow_actions=True) as somebody:
        somebody.client.cookies = cookies
        answer = await somebody.client.post("/en/act", data=form)
        page = unescape(answer.text)
        assert (answer.status_code, (await broker.stats("claims")).dead) == (403, 1)
        assert '"edited <for long>"</textarea>' in page
        found = re.search(r'name="proof" value="(\w+)"', page)
        assert found
        again = await somebody.client.post("/en/act", data=form | {"proof": found[1]})
        assert (again.status_code, (await broker.stats("claims")).ready) == (303, 1)


async def test_what_a_form_asked_for_after_its_session_is_said_not_to_be_done(broker) -> None:
    async with visiting(broker, token=TOKEN, allow_actions=True) as somebody:
        form = {"proof": "0" * 64, "do": Act("pause", "claims").packed(), "confirmed": "yes"}
        answer = await somebody.client.post("/en/act", data=form)
        assert (answer.status_code, "was not done" in answer.text) == (401, True)
        assert "was not done" not in await somebody.sees("/en/queues", 401)


async def test_it_is_read_only_unless_told_otherwise(broker) -> None:
    async with visiting(broker) as somebody:
        page = await somebody.client.get("/en/queue?name=claims")
        assert not re.search('form="(act|ask)"', page.text)
        cookie_bearer = re.search(r"proof", page.text)
        assert cookie_bearer is None
        form = {"proof": "", "do": Act("pause", "claims").packed(), "confirmed": "yes"}
        assert (await somebody.client.post("/en/act", data=form)).status_code == 403
        assert not (await broker.stats("claims")).paused


async def test_every_answer_carries_a_policy_under_which_nothing_inline_runs(broker) -> None:
    async with visiting(broker, allow_actions=True) as somebody:
        for path in ("/en/queues", "/en/nothing", "/static/live.js", "/static/nothing.js", "/"):
            headers = (await somebody.client.get(path)).headers
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
        for path in ("/en/queues", "/en/dead", "/en/queue?name=claims", "/fr/processes", "/fr/log"):
            page = await somebody.sees(path)
            assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|javascript:", page)


async def test_a_form_of_ten_megabytes_is_refused(broker) -> None:
    async with visiting(broker, allow_actions=True) as somebody:
        answer = await somebody.client.post("/en/act", content=b"do=" + b"x" * 10_000_000)
        assert answer.status_code == 413


async def test_of_a_form_of_strangers_no_more_is_held_than_a_token_takes(broker) -> None:
    async with visiting(broker, token=TOKEN) as somebody:
        answer = await somebody.client.post("/enter", content=b"token=" + b"x" * 20_000)
        assert (answer.status_code, answer.text) == (413, "This form has at most 16,384 bytes.\n")


async def test_a_form_that_does_not_come_whole_is_no_form() -> None:
    """Of a body of `1234` that a connection broke off behind `12`, the rest would have been another amount."""

    async def read(*parts: dict[str, Any]) -> dict[str, str]:
        coming = iter([{"type": "http.request", "body": b"confirmed=yes&body=12", "more_body": True}, *parts])

        async def receive() -> dict[str, Any]:
            return next(coming)

        return await read_form(receive)

    assert await read({"type": "http.request", "body": b"34"}) == {"confirmed": "yes", "body": "1234"}
    for rest in ({"type": "http.disconnect"}, {"type": "http.request", "body": b"%ff"}):
        with pytest.raises(FormError):
            await read(rest)


async def test_of_a_form_that_is_too_large_all_is_read_before_it_is_refused_so_that_the_browser_reads_why() -> None:
    megabytes = iter(range(10, -1, -1))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1_000_000, "more_body": next(megabytes) > 0}

    with pytest.raises(FormError) as refused:
        await read_form(receive)
    assert (refused.value.status, list(megabytes)) == (413, [])


async def test_who_does_not_read_a_live_page_gives_its_place_to_others_in_the_end(broker, monkeypatch) -> None:
    monkeypatch.setattr(pages, "STREAMS_MAX", 1)
    monkeypatch.setattr(pages, "LIVE_FOR", 0.1)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/en/queues", "query_string": b"live=stream"}
    scope |= {"headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 40_000), "server": ("127.0.0.1", 8748)}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}}
    async with visiting(broker) as somebody, asyncio.timeout(30):
        await somebody.sees("/en/queues")
        with monkeypatch.context() as impatient:
            impatient.setattr(pages, "UNREAD_FOR", 0.1)
            await somebody.dashboard(scope, receive, send)
        assert 'id="q-claims"' in await somebody.sees("/en/queues?live=stream")


async def test_no_more_live_pages_are_told_than_may_be_however_many_ask_at_once(broker, monkeypatch) -> None:
    monkeypatch.setattr(pages, "STREAMS_MAX", 2)
    answered: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.append(message["status"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/en/queues", "query_string": b"live=stream"}
    scope |= {"headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 40_000), "server": ("127.0.0.1", 8748)}
    async with visiting(broker) as somebody, asyncio.timeout(60):
        await somebody.sees("/en/queues")
        asking = [asyncio.create_task(somebody.dashboard(dict(scope), receive, send)) for _ in range(6)]
        while len(answered) < 6:
            await asyncio.sleep(0.01)
        await somebody.dashboard.close()
        await asyncio.gather(*asking)
    assert sorted(answered) == [200, 200, 503, 503, 503, 503]


async def test_the_head_of_a_live_page_comes_at_once(broker, monkeypatch) -> None:
    monkeypatch.setattr(pages, "LIVE_FOR", 3_600)
    async with visiting(broker) as somebody, asyncio.timeout(30):
        answer = await somebody.client.head("/en/queues?live=stream")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


async def test_the_names_of_hosts_are_the_same_in_capitals(broker) -> None:
    async with visiting(broker, token=TOKEN, hosts=["Ops.Example"], host="http://OPS.example") as somebody:
        await somebody.sees("/en/queues", 401)


# --- the pages -------------------------------------------------------------------------------------------------------


async def test_queues_stand_by_their_oldest_age(broker, visitor) -> None:
    await broker.send_to_queue("letters", 1)
    while not (await broker.stats("letters")).oldest_ready_age:  # or both were sent in one millisecond
        await asyncio.sleep(0.001)
    await broker.send_to_queue("claims", 1)
    page = await visitor.sees("/en/queues")
    assert page.index('id="q-letters"') < page.index('id="q-claims"')
    assert 'id="q-letters"' not in await visitor.sees("/en/queues?q=CLAIM")


async def test_a_page_beyond_the_last_queue_is_the_last_one(broker, visitor) -> None:
    for path in ("/en/queues?from=100", f"/en/queues?from={'9' * 18}"):
        assert 'id="q-claims"' in await visitor.sees(path)


@on_both
async def test_a_queue_is_paged_by_key_and_filtered(broker, visitor) -> None:
    await broker.send_many("claims", range(60), headers={"tenant": "north"})
    await broker.send_to_queue("claims", "south", headers={"tenant": "south"}, group="policy-1")
    page = await visitor.sees("/en/queue?name=claims")
    assert page.count("/en/message?") == 50
    (after,) = re.findall(r'(/en/queue\?[^"]*after=[^"]*)"', page)
    assert (await visitor.sees(after)).count("/en/message?") == 11
    for query in ("header=tenant%3Dsouth", "header=tenant=south", "group=policy-1"):
        assert (await visitor.sees(f"/en/queue?name=claims&{query}")).count("/en/message?") == 1
    assert (await visitor.sees("/en/queue?name=claims&older=3600")).count("/en/message?") == 0
    assert (await visitor.sees("/en/queue?name=claims&state=dead&group=policy-1")).count("/en/message?") == 0


@on_both
async def test_a_key_that_has_gone_is_said_to_be_gone(broker, visitor) -> None:
    receipt = await broker.send_to_queue("claims", 1)
    await broker.purge("claims")
    path = f"/en/queue?{urlencode({'name': 'claims', 'state': 'ready', 'after': receipt.id})}"
    assert "start again" in await visitor.sees(path, 410)


@on_both
async def test_a_nul_in_an_address_names_nothing(broker, visitor) -> None:
    for path in ("queue?name=%00", "message?queue=%00", "message?queue=claims&id=%00"):
        await visitor.sees(f"/en/{path}", 404)
    await visitor.sees("/en/queue?name=claims&state=ready&after=%00", 410)
    for state in filao.State:
        await visitor.sees(f"/en/queue?name=claims&state={state}&group=%00")
    for act in (
        Act("redrive", "claims", id="\0"),
        Act("cancel", "claims", id="\0"),
        Act("pause", "letters", group="\0"),
    ):
        await visitor.does(act)
    for do in ("what=cancel&queue=claims&id=\0", "what=redrive&queue=claims&reason=\0&error=\0"):
        form = {"proof": await visitor.proof(), "do": do, "confirmed": "yes"}
        assert (await visitor.client.post("/en/act", data=form)).status_code == 303


@on_both
async def test_what_is_not_there_is_not_found_and_names_what_looks_like_it(broker, visitor) -> None:
    receipt = await broker.send_to_queue("letters", 1)
    assert "claims" in await visitor.sees("/en/queue?name=claim", 404)
    await visitor.sees(f"/en/message?queue=claims&id={receipt.id}", 404)
    await visitor.sees("/en/message?queue=%00&id=%ff", 404)
    assert "claims" in await visitor.sees("/en/dead?queue=claim", 404)
    await visitor.sees("/en/nothing", 404)
    await visitor.sees("/de/queues", 404)


async def test_what_was_declared_a_moment_ago_is_there(broker, visitor) -> None:
    await visitor.sees("/en/queues")
    await broker.declare(filao.Queue("new"))
    await visitor.sees("/en/queue?name=new")


async def test_a_message_is_shown_whole_whatever_it_holds(broker, visitor) -> None:
    script = {"note": "<script>alert(1)</script>", "turned": "\u202eabc"}
    receipt = await broker.send_to_queue("claims", script, headers={"<b>": "</dd>\x1b[31m"}, message_id="a/b?c&d <i>")
    raw = (await visitor.client.get(f"/en/message?{urlencode({'queue': 'claims', 'id': receipt.id})}")).text
    assert "<script>alert" not in raw
    assert "&lt;script&gt;" in raw
    assert "\u202e" not in raw
    assert "\x1b" not in raw
    await broker.purge("claims")
    receipt = await broker.send_to_queue("claims", b"\x00\xffclaim")
    assert "00 ff 63 6c 61 69 6d" in await visitor.sees(f"/en/message?queue=claims&id={receipt.id}")
    receipt = await broker.send_to_queue("claims", "x" * 200_000)
    assert len(await visitor.sees(f"/en/message?queue=claims&id={receipt.id}")) < 100_000
    assert len(await visitor.sees(f"/en/message?queue=claims&id={receipt.id}&whole=1")) > 200_000


async def test_what_is_edited_shows_no_mark_that_turns_the_reading_round_and_keeps_it(broker, visitor) -> None:
    """Text from others: of `{"a": 1}` a mark may show something else than what is sent back."""
    await die(broker, {"an\u202eamount\x9b": "no\u202e"})
    (letter,) = await broker.dead_letters("claims")
    page = await visitor.sees(f"/en/message?queue=claims&id={letter.id}")
    (edited,) = re.findall(r'name="body"[^>]*>\n(.*)</textarea>', page)
    await visitor.sees("/en/dead")
    act = Act("redrive", "claims", reason="rejected", error="no\u202e")
    assert "\u202e" not in page + (await visitor.sends(act, confirmed="")).text + await visitor.sees("/en/dead")
    await visitor.does(Act("edit", "claims", id=letter.id), body=edited)
    assert [message.body for message in await broker.peek("claims")] == [letter.body]


async def test_a_body_is_redacted_by_a_function_of_the_users(broker) -> None:
    await broker.send_to_queue("claims", {"iban": "DE02 1203", "amount": 7})
    (message,) = await broker.peek("claims")

    def redact(stored: StoredMessage) -> StoredMessage:
        return structs.replace(stored, body=stored.body | {"iban": "…"})

    path = f"/en/message?queue=claims&id={message.id}"
    async with visiting(broker, redact=redact) as somebody:
        page = await somebody.sees(path)
        assert "DE02" not in page
        assert '"amount": 7' in page
    async with visiting(broker, redact=lambda stored: stored.body["nothing"]) as somebody:
        page = await somebody.sees(path)
        assert "DE02" not in page
        assert "KeyError" in page


async def test_a_message_that_is_gone_is_still_told_of_where_its_queue_remembers(broker, visitor) -> None:
    await broker.declare(filao.Queue("remembers", history=True))
    receipt = await broker.send_to_queue("remembers", 1)
    path = f"/en/message?queue=remembers&id={receipt.id}"
    assert "<b>sent</b>" in await visitor.sees(path)
    await (await broker.receive_from_queue("remembers")).ack()
    page = await visitor.sees(path)
    assert "no longer in its queue" in page
    assert "<b>acknowledged</b> · Attempt 1" in page
    await visitor.sees(path.replace("remembers", "claims"), 404)


@on_both
async def test_groups_tell_why_they_wait(broker, visitor) -> None:
    await broker.send_many("letters", range(3), group="halted")
    await (await broker.receive_from_queue("letters")).reject("no")
    await broker.send_many("letters", range(2), group="worked on")
    await broker.receive_from_queue("letters")
    page = await visitor.sees("/en/queue?name=letters")
    assert re.search(r"halted</a> · 2 wait · halted, by a dead letter or an operator", page)
    assert re.search(r"worked on</a> · 1 waits · its first message is being worked on", page)
    await visitor.does(Act("resume", "letters", group="halted"))
    assert (await broker.stats("letters")).ready == 1
    await visitor.does(Act("pause", "letters", group="halted"))
    assert (await broker.stats("letters")).ready == 0
    assert "group_dead" in await visitor.does(Act("pause", "claims", group="any"))


async def test_what_cannot_be_done_to_a_group_is_not_offered(broker, visitor) -> None:
    for name in ("claims", "letters"):
        await broker.send_many(name, range(3), group="one")
    for name, is_offered in (("claims", False), ("letters", True)):
        page = await visitor.sees(f"/en/queue?name={name}")
        assert "its first message" in page
        assert ('id="r-1"' in page) is is_offered


async def test_who_may_only_look_comes_from_a_queue_to_its_dead_letters(broker) -> None:
    async with visiting(broker) as somebody:
        assert 'href="/en/dead?queue=claims"' in await somebody.sees("/en/queue?name=claims")


async def test_a_dead_message_is_told_of_in_one_language(broker, visitor) -> None:
    await broker.declare(filao.Queue("remembered", history=True))
    await die(broker, {"a": "duplicate"}, "remembered")
    (letter,) = await broker.dead_letters("remembered", limit=1)
    page = await visitor.sees(f"/fr/message?queue=remembered&id={letter.id}")
    assert ">mort</span>" in page
    assert not re.search(r"rejected(?!&)", page)


async def test_of_an_error_of_several_lines_lists_show_the_one_that_names_it(broker, visitor) -> None:
    await broker.declare(filao.Queue("remembered", history=True))
    await die(broker, {"a": "ValueError: there is one\nDETAIL:  Key (id)=(1) already exists."}, "remembered")
    (letter,) = await broker.dead_letters("remembered", limit=1)
    for page in ("queue?name=remembered&state=dead", f"message?queue=remembered&id={letter.id}"):
        shown = re.findall(r'<span class="error">(.*?)</span>', await visitor.sees(f"/en/{page}"))
        assert set(shown) - {"rejected"} == {"ValueError: there is one"}


async def test_processes_tell_what_they_hold_and_for_how_long(broker, visitor) -> None:
    await broker.send_many("claims", range(2))
    held = await broker.receive_many("claims", 2)
    page = await visitor.sees("/en/processes")
    assert held[0].id in page
    assert "ends in" in page


async def test_ages_are_told_by_the_clock_of_the_store(url) -> None:
    """It goes evenly where ours is set, and a server's may be another: leases were said to have run out."""
    async with filao.connect(url, clock=Clock()) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        held = await broker.receive_from_queue("claims", lease=600)
        async with visiting(broker) as somebody:
            assert re.search("ends in \\d+\N{NO-BREAK SPACE}(min|s)<", await somebody.sees("/en/processes"))
            page = await somebody.sees(f"/en/message?queue=claims&id={held.id}")
            assert re.search("\\(\\d+\N{NO-BREAK SPACE}(min|s)\\)", page)
            page = await somebody.sees("/en/queue?name=claims&state=leased&older=1800")
            assert "/en/message?queue=claims&id=" not in page


async def test_of_more_than_is_listed_the_number_is_told(broker, visitor, monkeypatch) -> None:
    """A process that held 300 messages was said to have a hundred leases."""
    monkeypatch.setattr(views, "HELD_SHOWN", 2)
    monkeypatch.setattr(views, "HELD_QUEUES", 1)
    await broker.send_many("claims", range(5))
    await broker.send_many("letters", range(3))
    held = [await broker.receive_many(name, count, lease=600) for name, count in (("claims", 5), ("letters", 3))]
    page = await visitor.sees("/en/processes")
    assert ("<summary>8 leases</summary>" in page, page.count("ends in"), "and 6 more" in page) == (True, 2, True)
    for message in held.pop():
        await message.ack()
    monkeypatch.setattr(views, "HELD_SHOWN", 6)
    monkeypatch.setattr(views, "PROCESSES_SHOWN", 0)
    await visitor.dashboard._closing[-1].anew()
    page = await visitor.sees("/en/processes")
    assert ("lease" in page, "and 1 more" in page) == (False, True)


async def test_a_live_page_is_whole_whatever_ends_a_line_in_an_id(broker, visitor) -> None:
    """A stream of events ends a line at a carriage return too: what stood behind it was lost."""
    await broker.send_to_queue("claims", 1, message_id="a\rb\r\nc\nd\N{LINE SEPARATOR}e")
    await broker.receive_from_queue("claims", lease=600)
    came: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        if (body := message.get("body", b"")).startswith(b"data: ") and not came.done():
            came.set_result(body.decode())

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/en/processes", "query_string": b"live=stream"}
    scope |= {"headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 40_000), "server": ("127.0.0.1", 8748)}
    asking = asyncio.create_task(visitor.dashboard(scope, receive, send))
    lines = re.split("\r\n|\r|\n", await asyncio.wait_for(came, PATIENCE))
    await visitor.dashboard.close()
    await asking
    assert "data: </section>" in lines
    assert [line for line in lines if not line.startswith("data: ")] == ["", ""]  # the end of the event


async def test_the_page_stays_up_while_the_store_is_away(tmp_path) -> None:
    async with visiting(filao.connect(tmp_path / "nowhere" / "claims.db")) as somebody:
        page = await somebody.sees("/en/queues")
        assert "not answered yet" in page
        assert "nowhere" in page
        early = await somebody.client.get("/en/queue?name=claims")
        assert (early.status_code, early.headers["refresh"]) == (503, "2")
        assert "not there" not in early.text


async def test_who_receives_now_and_then_is_not_nobody(broker, visitor, monkeypatch) -> None:
    await broker.send_many("claims", range(3))
    nobody = "nobody receives from this queue"
    assert nobody in await visitor.sees("/en/queue?name=claims")
    await (await broker.receive_from_queue("claims")).ack()
    await visitor.dashboard._closing[-1].anew()
    assert (await broker.stats("claims")).receivers == ()
    assert nobody not in await visitor.sees("/en/queue?name=claims")
    monkeypatch.setattr(module_of_watch, "RECEIVED_LATELY", 0.0)
    assert nobody in await visitor.sees("/en/queue?name=claims")


async def test_who_does_not_confirm_is_led_back(broker, visitor) -> None:
    await die(broker, {"a": "no"})
    (letter,) = await broker.dead_letters("claims", limit=1)
    for act, led in (
        (Act("discard", "claims", reason="rejected", error="no"), "/en/dead?queue=claims"),
        (Act("redrive", "claims", id=letter.id), f"/en/message?queue=claims&id={letter.id}"),
        (Act("pause", "claims"), "/en/queue?name=claims"),
    ):
        asked = await visitor.sends(act, confirmed="")
        assert f'href="{led}">No</a>' in unescape(asked.text)


@pytest.mark.parametrize(
    "act", [Act("redrive", "claims"), Act("pause", "claims"), Act("purge", "claims"), Act("discard", "claims", id="7&")]
)
async def test_what_is_to_be_confirmed_has_an_address_in_both_languages(broker, visitor, act) -> None:
    """The page that answered a form could be neither gone back to nor read in the other language."""
    asked = f"/en/act?{urlencode({'do': act.packed()})}"
    page = await visitor.sees(asked)
    (other,) = re.findall(r'<a href="([^"]*)" hreflang="fr"', page)
    assert 'name="confirmed" value="yes"' in await visitor.sees(other)
    answered = await visitor.sends(act, confirmed="")
    assert f'action="{asked}"' in unescape(answered.text)


async def test_no_other_site_leads_to_what_is_to_be_confirmed(broker, visitor) -> None:
    """A key that is held down while the page opens would confirm it."""
    asked = f"/en/act?{urlencode({'do': Act('pause', 'claims').packed()})}"
    for site, status in (("cross-site", 303), ("same-site", 303), ("same-origin", 200), ("none", 200)):
        headers = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
        assert (await visitor.client.get(asked, headers=headers)).status_code == status, site
    async with visiting(broker, token=TOKEN, allow_actions=True) as somebody:
        entered = await somebody.client.post(f"/enter?{urlencode({'to': asked})}", data={"token": TOKEN})
        assert entered.headers["location"] == "/"


async def test_what_cannot_be_asked_at_an_address_leads_to_a_page_that_can(broker, visitor) -> None:
    edit = urlencode({"do": Act("edit", "claims", id="7").packed()})
    for asked, led in (
        ("/en/act", "/en/queues"),
        ("/fr/act?do=what%3Ddrop", "/fr/queues"),
        (f"/en/act?{edit}", "/en/message?queue=claims&id=7"),
    ):
        assert (await visitor.client.get(asked)).headers["location"] == led
    await visitor.sees(f"/de/act?{edit}", 404)
    async with visiting(broker) as reader:
        await reader.sees(f"/en/act?{edit}", 403)


async def test_a_file_that_was_put_in_the_place_of_another_is_shown_instead(
    broker, visitor, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module_of_watch, "LOOKS_EVERY", 0.05)
    assert 'id="q-claims"' in await visitor.sees("/en/queues")
    async with filao.connect(tmp_path / "backup.db") as backup:
        await backup.declare(filao.Queue("restored"))
    await asyncio.to_thread(restore, tmp_path / "backup.db", tmp_path / "claims.db")
    async with asyncio.timeout(60):
        while 'id="q-restored"' not in (page := await visitor.sees("/en/queues")):
            await asyncio.sleep(0.05)
    assert 'id="q-claims"' not in page
    await visitor.sees("/en/queue?name=restored")


async def test_no_empty_file_is_made_for_a_page_about_one_that_went_away(
    broker, visitor, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module_of_watch, "LOOKS_EVERY", 0.05)
    db = tmp_path / "claims.db"
    assert 'id="q-claims"' in await visitor.sees("/en/queues")

    async def sees(text: str) -> None:
        async with asyncio.timeout(60):
            while text not in await visitor.sees("/en/queues"):
                await asyncio.sleep(0.05)

    db.rename(tmp_path / "kept.db")
    db.mkdir()
    await sees("is a folder")
    db.rmdir()
    await sees("Nothing was made in its place")
    assert not db.exists()
    (tmp_path / "kept.db").rename(db)
    await sees('id="q-claims"')


async def test_a_connection_that_took_long_does_not_put_off_the_next_look(broker, monkeypatch) -> None:
    past, connect = [0.0], filao.Broker.open

    async def take_long(self: filao.Broker) -> None:
        past[0] = 1.0
        await connect(self)

    monkeypatch.setattr(module_of_watch, "LOOKS_EVERY", 0.05)
    monkeypatch.setattr(module_of_watch, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + past[0]))
    monkeypatch.setattr(filao.Broker, "open", take_long)
    watch = module_of_watch.Watch(broker)
    first = await watch.latest()
    assert (first.number, (await watch.after(first.number, 20.0)).number) == (1, 2)
    await watch.close()


async def test_it_is_mounted_under_a_prefix(broker) -> None:
    def mounted(dashboard: Any) -> Any:
        return Starlette(routes=[Mount("/ops/queues", dashboard)])

    async with visiting(broker, allow_actions=True, wrap=mounted) as somebody:
        arrived = await somebody.client.get("/ops/queues/", follow_redirects=True)
        assert arrived.url.path == "/ops/queues/en/queues"
        links = re.findall(r'(?:href|action|src)="([^"#]+)"', unescape(arrived.text))
        assert links
        assert all(link.startswith("/ops/queues/") for link in links)
        for link in set(links):
            if "/act" not in link:
                assert (await somebody.client.get(link)).status_code == 200, link


@pytest.mark.parametrize("prefix", ["/отчёты/queues", "/a b;c", '/50%/"<q>', "/why?/#1"])
async def test_a_prefix_of_any_characters_leads_to_the_pages_and_keeps_the_session(broker, prefix) -> None:
    """The cookie's path is compared with the address as browsers write it; a header of Cyrillic could not be sent."""

    def mounted(dashboard: Any) -> Any:
        return Starlette(routes=[Mount(prefix, dashboard)])

    written = quote(prefix)
    async with visiting(broker, token=TOKEN, allow_actions=True, wrap=mounted) as somebody:
        entered = await somebody.client.post(f"{written}/enter", data={"token": TOKEN})
        assert f"Path={written};" in f"{entered.headers['set-cookie']};"
        assert entered.headers["location"] == f"{written}/"
        page = await somebody.sees(f"{written}/en/queues")
        links = re.findall(r'(?:href|action|src)="([^"#]+)"', page)
        assert [link for link in links if not link.startswith(f"{written}/")] == []
        for link in {link for link in links if not link.endswith(("/act", "/leave"))}:
            assert (await somebody.client.get(link)).status_code == 200, link
        left = await somebody.client.post(f"{written}/leave")
        assert f"Path={written};" in f"{left.headers['set-cookie']};"


async def test_an_address_leads_to_the_page_that_was_meant_whatever_scheme_a_proxy_speaks(broker) -> None:
    """`http://`, which the proxy speaks to us, would have sent the browser past its TLS."""

    def mounted(dashboard: Any) -> Any:
        return Starlette(routes=[Mount("/ops", dashboard)])

    async with visiting(broker, wrap=mounted) as somebody:
        for asked, led in (
            ("/ops/fr", "/ops/fr/queues"),
            ("/ops/fr/", "/ops/fr/queues"),
            ("/ops/fr/queue/?name=claims", "/ops/fr/queue?name=claims"),
            ("/ops/enter", "/ops/en/queues"),
        ):
            answer = await somebody.client.get(asked)
            assert (answer.status_code, answer.headers["location"]) == (303, led)
        for asked in ("/ops/nothing", "/ops/nothing/", "/ops/en//queues", "/ops/a/b/c", "/ops//evil.example/"):
            assert "There is no such page." in await somebody.sees(asked, 404)


# --- triage ----------------------------------------------------------------------------------------------------------


async def test_dead_letters_are_grouped_by_reason_and_exception(broker, visitor) -> None:
    await die(broker, FOUR_KINDS)
    found = rows(await visitor.sees("/en/dead"))
    assert sorted(found) == [(1, "KeyError"), (1, "RuntimeError"), (2, "ValueError"), (3, "claim # is a duplicate")]


async def test_letters_that_left_during_the_look_are_not_said_to_be_cut_off(broker, visitor) -> None:
    await die(broker, FOUR_KINDS)
    await visitor.sees("/en/queues")
    await broker.redrive("claims", limit=3)
    assert "told apart are the first" not in await visitor.sees("/en/dead")


async def test_kinds_stay_in_sight_until_what_was_done_has_been_looked_at(broker, visitor) -> None:
    await die(broker, FOUR_KINDS)
    before = rows(await visitor.sees("/en/dead"))
    visitor.dashboard._closing[1].forget("claims")
    live = await visitor.sees("/en/dead?live=once")
    assert rows(live) == before
    assert "what stands here is from before" in live


async def test_until_dead_letters_are_told_apart_their_number_is(broker, visitor, monkeypatch) -> None:
    await die(broker, FOUR_KINDS)
    monkeypatch.setattr(views, "KINDS_WITHIN", 0.0)
    assert "7 dead letters are being told apart" in await visitor.sees("/en/dead")


@on_both
async def test_one_kind_is_redriven_and_the_log_says_who_did_it(broker, visitor) -> None:
    await die(broker, FOUR_KINDS)
    await visitor.sees("/en/dead")
    act = Act("redrive", "claims", reason="rejected", error="ValueError")
    asked = await visitor.sends(act, confirmed="")
    assert "Send 2 dead letters back" in asked.text
    assert "filao redrive claims --reason rejected --kind ValueError" in asked.text
    assert (await broker.stats("claims")).dead == 7
    page = await visitor.does(act)
    assert "ValueError" not in str(rows(page))
    assert {message.body for message in await broker.peek("claims")} == {"a", "b"}
    log = await visitor.sees("/en/log")
    assert re.search(
        r"\(127\.0\.0\.1\)</td><td>Redrive</td>.*rejected: ValueError</td>\s*<td class=\"num\">2 of 2</td>\s*<td>done",
        log,
        re.DOTALL,
    )


async def test_the_log_tells_of_a_kind_in_the_language_of_the_page(broker, visitor) -> None:
    await die(broker, {"a": ValueError("bad amount")})
    await visitor.does(Act("redrive", "claims", reason="rejected", error="ValueError"))
    assert "<td>rejet\N{NO-BREAK SPACE}: ValueError</td>" in await visitor.sees("/fr/log")
    assert "<td>rejected: ValueError</td>" in await visitor.sees("/en/log")


async def test_a_rate_is_kept_and_a_job_can_be_stopped(broker, visitor) -> None:
    await die(broker, {str(number): "no" for number in range(6)})
    await visitor.sees("/en/dead")
    answer = await visitor.sends(Act("redrive", "claims"), rate="0.01")
    async with asyncio.timeout(30):
        while 'progress max="6" value="1"' not in (page := await visitor.sees(answer.headers["location"])):
            await asyncio.sleep(0.05)
    assert 'value="1"' in await visitor.sees("/en/dead")  # it survives a reload
    (number,) = re.findall(r'name="stop" value="(\d+)"', page)
    await visitor.client.post("/en/act", data={"proof": await visitor.proof(), "stop": number})
    async with asyncio.timeout(30):
        while "stopped" not in await visitor.sees(f"/en/dead?job={number}"):
            await asyncio.sleep(0.05)
    assert (await broker.stats("claims")).dead == 5


async def test_a_job_that_does_not_know_yet_how_many_it_is_about_is_said_to_be_under_way(broker, visitor) -> None:
    end = asyncio.Event()

    async def last(_job: Job) -> None:
        await end.wait()

    jobs: Jobs = visitor.dashboard._closing[0]
    job = await jobs.begin(Deed("ada", "redrive", "claims"), last)
    assert "under way" in await visitor.sees("/en/queues")
    end.set()
    assert job.task is not None
    await job.task
    assert "under way" not in await visitor.sees(f"/en/queues?job={job.number}")


@on_both
async def test_a_job_is_told_of_by_another_dashboard_of_the_store_and_after_its_process_died(
    broker, visitor, monkeypatch
) -> None:
    monkeypatch.setattr(module_of_jobs, "RECORDED_EVERY", 0.01)
    await die(broker, {str(number): "no" for number in range(6)})
    await visitor.sees("/en/dead")
    page = (await visitor.sends(Act("redrive", "claims"), rate="0.01")).headers["location"]
    async with visiting(broker, allow_actions=True) as another:
        async with asyncio.timeout(30):
            while 'progress max="6" value="1"' not in (told := await another.sees(page)):
                await asyncio.sleep(0.01)
        assert "goes on in another process, or its process died" in told
        assert 'name="stop"' not in told
        await visitor.dashboard.close()
        assert "<strong>stopped</strong>" in await another.sees(page)
        assert "is not known here any more" in await another.sees("/en/dead?job=999999999999999999")


@on_both
async def test_what_a_deed_has_done_is_told_though_nobody_had_counted_what_it_is_about(broker, visitor) -> None:
    """Its letters had died since the last look; then its process died."""
    log = engine_of(broker).overview.log
    number = await log.begin(Deed("ada", "redrive", "claims"))
    await log.record(number, 3)
    for page in ("log", f"dead?job={number}"):
        assert "3 of 3" in await visitor.sees(f"/en/{page}"), page
    (found,) = [one.text for one in await broker.doctor() if one.subject == "dashboard's log"]
    assert "by ada, 3 of 3 messages" in found


@on_both
async def test_a_long_error_is_of_the_same_kind_on_the_page_and_on_the_command_line(broker, visitor) -> None:
    error = "the bank's answer: " + "".join(f"{number:x}" for number in range(3_000))
    await die(broker, {"a": error, "b": RuntimeError("x" * 1_500)})
    found = {kind for _, kind in rows(await visitor.sees("/en/dead"))}
    assert found == {error_kind(letter.error) for letter in await broker.dead_letters("claims")}
    assert "RuntimeError" in found


@on_both
async def test_what_another_discards_meanwhile_ends_no_walk_through_the_others(broker, monkeypatch) -> None:
    """The id that a sender gave names no place any more: a job on 2,000 of these had ended before it began."""
    overview = engine_of(broker).overview
    monkeypatch.setattr(type(overview), "glance_max", 2)
    for number in range(6):
        await broker.send_to_queue("claims", number, message_id=f"claim-{number}")
        await (await broker.receive_from_queue("claims")).reject("no")
    found: list[str] = []
    async for letter in dead_letters(overview, "claims", 100):
        found.append(letter.id)
        if letter.id in ("claim-1", "claim-3"):
            await broker.discard("claims", ids=[letter.id])
    assert found == [f"claim-{number}" for number in range(6)]


@on_both
async def test_one_is_discarded_and_all_are_redriven(broker, visitor) -> None:
    await die(broker, FOUR_KINDS)
    (first, *_) = await broker.dead_letters("claims")
    await visitor.does(Act("discard", "claims", id=first.id))
    assert (await broker.stats("claims")).dead == 6
    await visitor.does(Act("redrive", "claims"))
    assert (await broker.stats("claims")).ready == 6


async def test_what_somebody_else_has_done_meanwhile_is_said(broker, visitor) -> None:
    await die(broker, {"a": "no"})
    (letter,) = await broker.dead_letters("claims")
    act = Act("edit", "claims", id=letter.id)
    assert "not there any more" not in await visitor.does(act, body='"first"')
    assert "1 was not there any more" in await visitor.does(act, body='"second"')
    assert [message.body for message in await broker.peek("claims")] == ["first"]


async def test_where_a_job_ends_is_said_before_it_begins(broker, visitor, monkeypatch) -> None:
    await die(broker, FOUR_KINDS)
    await visitor.sees("/en/dead")
    kind = Act("discard", "claims", reason="rejected", error="ValueError")
    assert "the first" not in (await visitor.sends(kind, confirmed="")).text
    monkeypatch.setattr("filao.dashboard.acts.LOOKED_AT_MAX", 6)
    monkeypatch.setattr("filao.dashboard.acts.CHOSEN_MAX", 6)
    asked = (await visitor.sends(kind, confirmed="")).text
    assert "counted among the first 10,000" in asked
    assert "goes through the first 100,000" in asked
    await visitor.does(Act("redrive", "claims"))
    assert (await broker.stats("claims")).dead == 0  # all of a queue have no such bound
    await die(broker, FOUR_KINDS)
    await visitor.does(Act("discard", "claims"), rate="10000")
    assert (await broker.stats("claims")).dead == 1


async def test_an_edited_body_must_fit_the_queues_type(broker) -> None:
    await die(broker, {"a": "no"})
    (letter,) = await broker.dead_letters("claims")
    act = Act("edit", "claims", id=letter.id)
    async with visiting(broker, allow_actions=True, queues=[filao.Queue("claims", int)]) as somebody:
        for body in ("{", '"text"', "", "1" * 400_000):
            answer = await somebody.sends(act, body=body)
            assert answer.status_code == 400, body
        assert (await broker.stats("claims")).ready == 0
        assert "No dead letters" not in await somebody.sees("/en/dead")
        await somebody.does(act, body="7")
    assert [message.body for message in await broker.peek("claims")] == [7]


async def test_an_edited_body_is_kept_as_it_was_typed_in(broker) -> None:
    """Its type would drop the key, and write the date otherwise."""
    typed = filao.Queue("claims", Dated)
    await broker.declare(typed)
    await die(broker, {Dated(datetime(2026, 1, 1, tzinfo=UTC)): "no"})
    (letter,) = await broker.dead_letters("claims")
    edited = {"on": "2026-01-02T00:00:00+00:00", "note": "kept"}
    async with visiting(broker, allow_actions=True, queues=[typed]) as somebody:
        await somebody.does(Act("edit", "claims", id=letter.id), body=json.dumps(edited))
    assert [message.body for message in await broker.peek("claims")] == [edited]
    assert [message.body for message in await broker.peek(typed)] == [Dated(datetime(2026, 1, 2, tzinfo=UTC))]


@pytest.mark.parametrize("queue", ["claims", "-claims", "--help"])
@pytest.mark.parametrize("about", [{}, {"id": "-7"}, {"id": "a b'c"}, {"reason": "rejected", "error": "-Error"}])
def test_the_command_that_is_named_beside_a_deed_does_the_same_whatever_names_and_ids_look_like(queue, about) -> None:
    """It is read as the command line reads it, but not run."""
    whats = ["cancel"] if "id" in about else ["purge"] if not about else []
    for what in ("redrive", "discard", *whats):
        program, name, *arguments = shlex.split(Act(what, queue, **about).twin())
        command = commands.get_command(click.Context(commands), name)
        assert program == "filao"
        assert command is not None
        read = command.make_context(name, arguments).params
        assert queue in read["arguments"]
        assert about.get("id") in (None, *read.get("ids", ()), *read["arguments"])
        assert read.get("kind") == about.get("error")


async def test_a_purge_wants_the_queues_name(broker, visitor) -> None:
    await broker.send_many("claims", range(3))
    assert (await visitor.sends(Act("purge", "claims"), name="letters")).status_code == 400
    assert (await broker.stats("claims")).ready == 3
    await visitor.does(Act("purge", "claims"), name="claims")
    assert (await broker.stats("claims")).ready == 0


async def test_a_queue_is_paused_and_resumed_and_a_message_cancelled(broker, visitor) -> None:
    receipt = await broker.send_to_queue("claims", 1)
    assert "paused" in await visitor.does(Act("pause", "claims"))
    assert (await broker.stats("claims")).paused
    await visitor.does(Act("resume", "claims"))
    assert not (await broker.stats("claims")).paused
    await visitor.does(Act("cancel", "claims", id=receipt.id))
    assert (await broker.stats("claims")).cancelled == 1


async def test_what_no_button_does_is_refused(broker, visitor) -> None:
    for do in (
        "",
        "what=drop&queue=claims",
        "what=redrive",
        "what=redrive&queue=../x",
        "what=cancel&queue=claims",
        "what=purge&queue=claims&id=1",  # the log would tell of one
        "what=pause&queue=letters&id=1",
        "what=redrive&queue=claims&id=1&reason=rejected&error=",
        "x" * 99,
        f"what=cancel&queue=claims&id={'x' * 100_000}",  # the log would keep ten thousand of these
        f"what=pause&queue=letters&group={'x' * 100_000}",
    ):
        form = {"proof": await visitor.proof(), "do": do, "confirmed": "yes"}
        assert (await visitor.client.post("/en/act", data=form)).status_code == 400
    assert (await visitor.sends(Act("redrive", "claims"), rate="quick")).status_code == 400
    assert (await visitor.sends(Act("pause", "nothing"))).status_code == 303
    assert "nothing" in await visitor.sees("/en/log")


@pytest.fixture
async def jobs(broker: filao.Broker) -> AsyncGenerator[Jobs]:
    kept = Jobs(lambda: engine_of(broker).overview)
    yield kept
    await kept.close()


async def end(job: Job) -> None:
    assert job.task is not None
    await asyncio.wait_for(asyncio.shield(job.task), 30)


async def test_a_step_that_has_begun_is_seen_through_and_counted_when_its_job_is_stopped(broker, jobs) -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def step(ids: Sequence[str]) -> int:
        began.set()
        await may_end.wait()
        return len(ids)

    job = await jobs.begin(Deed("ada", "redrive", "claims", wanted=2), lambda job: in_slices(job, ["a", "b"], step, 1))
    await asyncio.wait_for(began.wait(), 30)
    jobs.stop(job.number)
    may_end.set()
    await end(job)
    (deed,) = await engine_of(broker).overview.log.deeds(1)
    assert (deed.done, deed.outcome) == (1, "stopped")


async def test_a_job_waits_for_a_store_that_is_away_and_says_what_is_uncertain(broker, jobs, monkeypatch) -> None:
    monkeypatch.setattr(module_of_jobs, "ASKS_EVERY", 0.01)
    answers: Iterator[int | Exception] = iter(
        [1, filao.EngineUnavailable("away"), filao.EngineUnavailable("away"), 0, 1]
    )

    async def step(_: Sequence[str]) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    deed = Deed("ada", "redrive", "claims", wanted=3)
    job = await jobs.begin(deed, lambda job: in_slices(job, ["a", "b", "c"], step, 5.0))
    await end(job)
    assert (job.outcome, job.done, job.unanswered) == ("done", 2, 1)


async def test_what_a_step_has_done_before_it_failed_is_counted(jobs, monkeypatch) -> None:
    monkeypatch.setattr(module_of_jobs, "ASKS_EVERY", 0.01)
    ends: Iterator[tuple[int, filao.FilaoError | None]] = iter(
        [(1, filao.EngineUnavailable("away")), (2, None), (1, filao.EngineError("refused"))]
    )

    async def step(_: Sequence[str]) -> int:
        with Tally() as tally:
            tally.done, error = next(ends)
            if error is not None:
                raise error
        return tally.done

    async def work(job: Job) -> None:
        await in_slices(job, ["a", "b", "c"], step, None)
        await step(["d", "e"])

    job = await jobs.begin(Deed("ada", "redrive", "claims", wanted=5), work)
    await end(job)
    assert (job.done, job.unanswered) == (4, 0)
    assert "refused" in job.outcome


async def test_a_job_that_waits_for_a_store_can_be_stopped(jobs) -> None:
    is_asked = asyncio.Event()

    async def step(_: Sequence[str]) -> int:
        is_asked.set()
        raise filao.EngineUnavailable("away")

    job = await jobs.begin(Deed("ada", "redrive", "claims"), lambda job: in_slices(job, ["a"], step, None))
    await asyncio.wait_for(is_asked.wait(), 30)
    jobs.stop(job.number)
    await end(job)
    assert job.outcome == "stopped"


async def test_a_step_that_took_long_is_not_followed_by_a_burst(jobs, monkeypatch) -> None:
    now, rests = 0.0, list[float]()

    async def rested(_: Job, seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += max(0.0, seconds)

    async def step(ids: Sequence[str]) -> int:
        nonlocal now
        now += 60.0 if ids == ["b"] else 0.0
        return 1

    monkeypatch.setattr(module_of_jobs, "_rested", rested)
    monkeypatch.setattr(module_of_jobs, "time", SimpleNamespace(monotonic=lambda: now))
    await in_slices(Job(1, Deed("ada", "redrive", "claims"), 4), ["a", "b", "c", "d"], step, 1.0)
    assert rests == [1.0, 0.0, 1.0, 1.0]


async def test_how_a_job_ended_is_noted_once_the_store_is_back(broker, monkeypatch) -> None:
    monkeypatch.setattr(module_of_jobs, "ASKS_EVERY", 0.01)
    is_away = False

    def overview() -> Overview:
        if is_away:
            raise filao.EngineUnavailable("away")
        found: Overview = engine_of(broker).overview
        return found

    async def go_away(_: Job) -> None:
        nonlocal is_away
        is_away = True

    jobs = Jobs(overview)
    job = await jobs.begin(Deed("ada", "pause", "claims"), go_away)
    async with asyncio.timeout(30):
        while not job.outcome:
            await asyncio.sleep(0.01)
        is_away = False
        await end(job)
    (deed,) = await engine_of(broker).overview.log.deeds(1)
    assert deed.outcome == "done"
    await jobs.close()


async def test_a_long_job_is_remembered_however_many_short_ones_came_after_it(jobs) -> None:
    may_end = asyncio.Event()

    async def last(_: Job) -> None:
        await may_end.wait()

    async def pass_by(_: Job) -> None:
        pass

    long = await jobs.begin(Deed("ada", "redrive", "claims"), last)
    for _ in range(REMEMBERED_MAX + 1):
        await end(await jobs.begin(Deed("ada", "pause", "claims"), pass_by))
    assert jobs.running() == [long]
    may_end.set()
    await end(long)


async def test_no_more_jobs_begin_at_once_than_may_run(jobs) -> None:
    async def last(job: Job) -> None:
        await job.stopping.wait()

    deed = Deed("ada", "redrive", "claims")
    begun = await asyncio.gather(*(jobs.begin(deed, last) for _ in range(RUNNING_MAX + 3)), return_exceptions=True)
    assert len(jobs.running()) == RUNNING_MAX
    assert [type(one) for one in begun].count(TooMuchError) == 3


# --- what it costs ---------------------------------------------------------------------------------------------------


async def test_no_statement_of_the_dashboard_walks_past_messages(broker) -> None:
    await die(broker, FOUR_KINDS)
    await broker.send_many("claims", range(5), group="policy-1")
    receipt = await broker.send_to_queue("claims", 1, delay=50)
    await broker.receive_from_queue("claims")
    seen: set[str] = set()
    async with visiting(broker, allow_actions=True) as somebody:
        await somebody.sees("/en/queues")
        await on_connection(broker, "set_trace_callback", seen.add)
        for state in filao.State:
            page = await somebody.sees(f"/en/queue?name=claims&state={state}")
            await somebody.sees(f"/en/queue?name=claims&state={state}&group=policy-1")
            for after in re.findall(r"message\?queue=claims&id=([\w-]+)", page)[:1]:
                await somebody.sees(f"/en/queue?name=claims&state={state}&after={after}")
                await somebody.sees(f"/en/queue?name=claims&state={state}&after={after}&group=policy-1")
        for path in (f"message?queue=claims&id={receipt.id}", "dead", "processes", "log", "queues"):
            await somebody.sees(f"/en/{path}")
        await on_connection(broker, "set_trace_callback", None)
    queries = [sql for sql in seen if sql.split()[0] == "SELECT" and "filao_" in sql]
    assert len(queries) > 15
    db = sqlite3.connect(engine_of(broker)._database.hold.path)
    for sql in queries:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert not [step for step in plan if "SCAN filao_message" in step or "SCAN filao_failure" in step], (sql, plan)
        assert not [step for step in plan if "TEMP B-TREE" in step and "last term" not in step.lower()], (sql, plan)
    db.close()


_TOUCHED = """
    SELECT pg_stat_force_next_flush(), (
      SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint
      FROM pg_stat_user_tables WHERE schemaname = 'filao' AND relname IN ('message', 'failure')
    )
"""


@pytest.mark.parametrize("broker", ["postgresql"], indirect=True)
async def test_pages_touch_no_more_rows_of_postgresql_than_they_show(broker) -> None:
    await broker.send_many("claims", range(8_000))
    await broker.send_many("claims", range(8_000), delay=500)
    await broker.send_many("letters", range(8_000), group="policy-1")
    (held,) = await broker.receive_many("letters", 1)
    with psycopg.connect(engine_of(broker)._server.url, autocommit=True) as database:

        async def touched() -> int:
            await engine_of(broker)._main.row("SELECT pg_stat_force_next_flush()")
            return int(database.execute(_TOUCHED).fetchall()[0][1])

        async with visiting(broker) as somebody:
            await somebody.sees("/en/queues")
            before = await touched()
            for queue, state in (
                ("claims", "ready"),
                ("claims", "delayed"),
                ("claims", "dead"),
                ("letters", "blocked"),
            ):
                page = await somebody.sees(f"/en/queue?name={queue}&state={state}")
                for after in re.findall(r"after=([\w-]+)", page)[:1]:
                    await somebody.sees(f"/en/queue?name={queue}&state={state}&after={after}")
                    await somebody.sees(f"/en/queue?name={queue}&state={state}&after={after}&group=policy-1")
            for path in ("queue?name=letters&state=leased", f"message?queue=letters&id={held.id}", "dead", "processes"):
                await somebody.sees(f"/en/{path}")
            assert (
                0 < await touched() - before < 12_000
            )  # a thousand for a look at most; to walk each list once would be 60,000


# --- its words -------------------------------------------------------------------------------------------------------


def test_both_languages_say_the_same() -> None:
    english, french = texts("en"), texts("fr")
    assert english.keys() == french.keys()
    for key, text in english.items():
        assert set(re.findall(r"{(\w+)}", text)) == set(re.findall(r"{(\w+)}", french[key])), key


def test_every_word_of_the_templates_is_known() -> None:
    known = texts("en")
    for template in FOLDER.glob("templates/**/*.html"):
        for key in re.findall(r'\bt\("(\w+)"[,)]', template.read_text()):
            assert key in known, (template.name, key)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("Traceback …\n  File\nValueError: bad 1\n", "ValueError"),
        ("Traceback …\nmy.own.Error\n", "my.own.Error"),
        ("claim 17 of 3", "claim # of #"),
        ("", ""),
        ("x" * 5_000, "x" * 80),
        ("Traceback …\n" + "  File\n" * 1_000 + "ValueError: bad 1\n", "ValueError"),
        ("Traceback …\nerrors.UniqueViolation: 1\nDETAIL:  Key\nCONTEXT:  a function\n", "errors.UniqueViolation"),
        ("Traceback …\nerrors.UniqueViolation: 1\nSZCZEGÓŁY:  Klucz\n", "errors.UniqueViolation"),
        ("Traceback …\nmy.SyntaxError: 1\nLINE 1: SELEC\n        ^\nHINT:  none\n", "my.SyntaxError"),
    ],
)
def test_an_error_is_of_a_kind(error: str, kind: str) -> None:
    assert error_kind(error) == kind


# --- in other frameworks ---------------------------------------------------------------------------------------------


async def test_it_is_mounted_in_a_stock_fastapi(broker) -> None:
    import fastapi

    def mounted(dashboard: Any) -> Any:
        application = fastapi.FastAPI()
        application.mount("/ops/queues", dashboard)
        return application

    async with visiting(broker, allow_actions=True, wrap=mounted) as somebody:
        page = await somebody.sees("/ops/queues/en/queues")
        proof = re.search(r'name="proof" value="(\w+)"', page)
        assert proof
        form = {"proof": proof[1], "do": Act("pause", "claims").packed(), "confirmed": "yes"}
        answer = await somebody.client.post("/ops/queues/en/act", data=form)
        assert answer.headers["location"].startswith("/ops/queues/en/queue?name=claims")
        assert (await broker.stats("claims")).paused


DJANGO = """
import asyncio, sys
import django, httpx
from django.conf import settings

settings.configure(SECRET_KEY="tests", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
urlpatterns = []
django.setup()

from django.core.asgi import get_asgi_application
from starlette.applications import Starlette
from starlette.routing import Mount

import filao
from filao.cli import commands
from filao.dashboard import app

application = Starlette(
    routes=[Mount("/ops/queues", app(filao.connect(sys.argv[1]))), Mount("/", get_asgi_application())]
)

async def main():
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for path in ("/ops/queues/en/queue?name=claims", "/other"):
            print((await client.get(path)).status_code)

asyncio.run(main())
"""


async def test_it_is_mounted_beside_a_stock_django(broker, tmp_path) -> None:
    script = tmp_path / "site_of_ours.py"
    script.write_text(DJANGO)
    ran = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(tmp_path / "claims.db"), stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(ran.communicate(), 60)
    assert out.split() == [b"200", b"404"], err.decode()


# --- the server goes, and comes back ---------------------------------------------------------------------------------


async def test_while_a_server_is_away_pages_show_what_was_seen_and_since_when(postgres) -> None:
    url = urlsplit(postgres.create(f"dashboard{next(_databases)}"))
    with closing(Proxy(url.port or 5432)) as proxy:
        far = url._replace(netloc=f"{url.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}".lstrip("@")).geturl()
        async with filao.connect(far) as broker, visiting(broker) as somebody:
            await broker.declare(filao.Queue("claims"))
            assert 'id="q-claims"' in await somebody.sees("/en/queues")
            proxy.lead_to(1)
            async with asyncio.timeout(60):
                while "has not answered since" not in (page := await somebody.sees("/en/queues")):
                    await asyncio.sleep(0.1)
            assert 'id="q-claims"' in page
            assert "What stands here was seen then" in page
            away = await somebody.client.get("/en/queue?name=claims")  # it comes again by itself, and says it once
            assert (away.status_code, away.headers["refresh"]) == (503, "2")
            assert away.text.count("is away") == 1
            assert "was seen then" not in away.text
            proxy.lead_to(url.port or 5432)
            async with asyncio.timeout(60):
                while "has not answered since" in await somebody.sees("/en/queues"):
                    await asyncio.sleep(0.1)
            await somebody.sees("/en/queue?name=claims")
