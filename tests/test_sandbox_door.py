"""Whom the sandbox lets in, what it makes of what it is sent, and what it runs: no other site, no wrong number, no
stray file.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import websockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from filao.sandbox.crew import Crew
from filao.sandbox.room import Room
from filao.sandbox.visits import ROOMS_MAX, Visit
from filao.sandbox.web.events import BOUNDS, VERBS, Asked
from tests.support.learner import TOKEN, Sandbox, sandbox, until, until_soon

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with sandbox(tmp_path_factory.mktemp("door") / "files", linger=0.5) as running:
        yield running


@pytest.fixture
def visitor(served: Sandbox) -> Iterator[httpx.Client]:
    """Have somebody who was let in."""
    with httpx.Client(base_url=served.url, follow_redirects=True) as client:
        assert client.get(f"/en?token={TOKEN}").status_code == 200
        yield client


@asynccontextmanager
async def socket(served: Sandbox, visitor: httpx.Client, **headers: str) -> AsyncGenerator[Any]:
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    address = served.url.replace("http", "ws") + "socket"
    given_headers = {"Origin": served.url.rstrip("/"), "Cookie": cookie} | headers
    async with websockets.connect(address, additional_headers=given_headers) as opened:
        yield opened


async def scene(opened: Any) -> dict[str, Any]:
    """Return the next whole scene."""
    async with asyncio.timeout(30):
        while True:
            told = json.loads(await opened.recv())
            if "scene" in told:
                found: dict[str, Any] = told["scene"]
                return found


# --- who comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
    ids=["rebinding", "other origin", "an image on another site", "another port"],
)
def test_pages_of_other_sites_are_not_answered(visitor, headers) -> None:
    refused = visitor.get("/en", headers=headers)
    assert refused.status_code == 403
    assert "This sandbox" in refused.text


def test_a_link_on_another_page_may_lead_here(visitor) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert visitor.get("/en", headers=headers).status_code == 200
    assert visitor.get("/static/app.js", headers=headers).status_code == 403


def test_no_page_can_frame_it_and_nothing_is_kept_or_guessed(visitor) -> None:
    for path in ("/en", "/static/app.js", "/nothing"):
        headers = visitor.get(path).headers
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_only_those_who_know_the_token_come_in_and_it_is_in_no_cookie(served) -> None:
    assert served.address.endswith(f"?token={TOKEN}")
    assert httpx.get(f"{served.url}en").status_code == 403
    assert httpx.get(f"{served.url}en?token=wrong-horse").status_code == 403
    answer = httpx.get(f"{served.url}en?token={TOKEN}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/en"
    cookie = answer.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert httpx.get(f"{served.url}en", headers={"Cookie": f"{cookie.partition('=')[0]}=guessed"}).status_code == 403


def test_two_sandboxes_in_one_browser_let_their_visitor_in(served, visitor, tmp_path) -> None:
    """The ports of a host share its cookies: to open the second closed the first."""
    with sandbox(tmp_path / "files") as other:
        assert visitor.get(f"{other.url}en?token={TOKEN}").status_code == 200
    assert visitor.get("/en").status_code == 200


@pytest.mark.parametrize("path", ["//evil.example/", "/%2f%2fevil.example", "/\\evil.example", "/static/app.js"])
def test_it_redirects_only_to_itself(served, path) -> None:
    answer = httpx.get(f"{served.url.rstrip('/')}{path}?token={TOKEN}")
    assert answer.headers.get("location", "/") == "/"


async def test_guesses_wait_for_each_other_and_too_many_are_turned_away(served) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        began = time.monotonic()
        guesses = [client.get(f"{served.url}en?token=wrong-{number}") for number in range(24)]
        found = [answer.status_code for answer in await asyncio.gather(*guesses)]
        assert set(found) == {403, 429}
        assert time.monotonic() - began >= 0.5 * (found.count(403) - 1)


def test_the_token_stands_in_no_command_line(served) -> None:
    assert TOKEN not in Path(f"/proc/{served.process.pid}/cmdline").read_text()


def test_what_is_not_found_writes_nothing_into_the_log(served, visitor) -> None:
    before = served.said()
    for path in ("/nothing%0a%1b%5b31mforged", "/static/..%2fdoor.py", "/static/page.html"):
        assert visitor.get(path).status_code == 404
    assert served.said() == before


async def test_plain_requests_take_no_room(served) -> None:
    for _ in range(ROOMS_MAX + 2):
        async with httpx.AsyncClient(follow_redirects=True) as client:
            assert (await client.get(f"{served.url}fr?token={TOKEN}")).status_code == 200
    assert served.rooms() == []


async def test_a_socket_of_another_site_or_without_a_session_is_refused(served, visitor) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Cookie": ""}):
        with pytest.raises((websockets.InvalidStatus, websockets.ConnectionClosed)):
            async with socket(served, visitor, **headers) as opened:
                await opened.recv()
    assert served.rooms() == []


# --- what is asked ---------------------------------------------------------------------------------------------------


async def test_no_event_ends_the_housekeeping(served, visitor) -> None:
    steps: list[Any] = [9999, -1, 1e308, "x", None, True, [], 10**30]
    values: list[Any] = [0, -5, 1e300, "x", None, {}]
    odd: list[Any] = [
        *({"do": "go", "step": step} for step in steps),
        *({"do": "set", "rule": rule, "value": value} for rule in BOUNDS for value in values),
        *(
            {"do": verb, "consumer": number}
            for verb in ("kill", "pause", "resume", "slow")
            for number in (0, -1, 10**15)
        ),
        {"do": "submit", "count": 10**9},
        {"do": "restore", "done": [1, {}], "chosen": {"create": 77}, "current": "last"},
        {"do": "story", "claim": -5},
        {"do": "predict", "place": 10**6},
        {"do": "nothing"},
        {"do": []},
        {},
    ]
    async with socket(served, visitor) as opened:
        await scene(opened)
        for event in odd:
            await opened.send(json.dumps(event))
        for text in ("not json", "[]", "1", '{"do": "go", "step": NaN}', "[" * 5000):
            await opened.send(text)
        async with asyncio.timeout(60):  # what comes while too much is being done waits
            while (told := (await scene(opened))["lesson"])["current"] != 0 or not told["is_done"]:
                await opened.send(json.dumps({"do": "go", "step": 0}))
                await opened.send(json.dumps({"do": "act", "key": "create"}))
    await until_soon(lambda: served.rooms() == [])  # and rooms are still closed
    assert "Traceback" not in served.said()


async def test_what_a_page_has_begun_is_done_to_its_end_though_the_page_is_loaded_anew(served, visitor) -> None:
    async with socket(served, visitor) as opened:
        await opened.send(json.dumps({"do": "go", "step": 3}))
        while (await scene(opened))["lesson"]["current"] != 3:
            pass
        await opened.send(json.dumps({"do": "act", "key": "three_consumers"}))
        while not (await scene(opened))["lesson"]["busy"]:
            pass
    async with socket(served, visitor) as opened, asyncio.timeout(30):
        while (await scene(opened))["stage"]["producer"]["sent"] < 12:
            pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
)
def test_whatever_an_argument_is_it_is_read_within_its_bounds(value) -> None:
    asked = Asked({"x": value})
    assert 1 <= asked.number("x", 1, 5) <= 5
    assert asked.whole("x", 0, 10) in range(11)
    assert len(asked.text("x", 3)) <= 3
    assert asked.choice("x", ("a", "b")) in ("a", "b")
    assert asked.flag("x") in (True, False)
    assert all(isinstance(one, str) for one in asked.texts("x"))
    assert isinstance(asked.mapping("x"), dict)


def test_every_verb_is_known_by_the_page() -> None:
    static = Path(__file__).parents[1] / "src" / "filao" / "sandbox" / "web" / "static"
    source = "".join(path.read_text() for path in static.glob("*.js"))
    for verb in VERBS:
        assert f'do: "{verb}"' in source or f'act: "{verb}"' in source or f'"{verb}"' in source, verb


async def test_a_look_that_fails_is_not_the_last(tmp_path, caplog) -> None:
    room = tmp_path / "room"
    room.mkdir()
    visit = Visit(await Room(room).__aenter__())
    failed: list[int] = []
    look = visit.room.look

    async def look_or_fail() -> Any:
        if len(failed) < 3:
            failed.append(1)
            raise ZeroDivisionError
        return await look()

    visit.room.look = look_or_fail  # type: ignore[method-assign]
    await visit.act("create")
    await until_soon(lambda: "create" in visit.progress.done)
    assert "ZeroDivisionError" in caplog.text
    await visit.close()


# --- what is run -----------------------------------------------------------------------------------------------------


class Nothing(msgspec.Struct):
    """Orders of a process that has none."""


def test_no_python_file_that_lies_in_the_current_folder_is_run(tmp_path, monkeypatch) -> None:
    here, rooms, mark = tmp_path / "here", tmp_path / "rooms", tmp_path / "mark"
    here.mkdir()
    rooms.mkdir()
    for name in ("asyncio", "msgspec", "sqlite3", "filao"):
        (here / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.chdir(here)
    entries = [entry for entry in sys.path if entry and Path(entry).name == "src"]
    monkeypatch.setenv("PYTHONPATH", f":{entries[0] if entries else ''}:")
    crew = Crew(rooms)
    crew.start(1, "filao.sandbox.worker", Nothing())
    until(lambda: crew.has_ended(1))
    crew.end_all()
    assert not mark.exists()
    assert "file" in (rooms / "consumer-1.err").read_text()  # it came as far as its orders


# --- the command -----------------------------------------------------------------------------------------------------


def filao_sandbox(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    import os

    command = [sys.executable, "-m", "filao", "sandbox", "--no-browser", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment
    )


def test_a_port_that_is_in_use_is_told(served) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    ran = filao_sandbox("--port", port)
    assert ran.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in ran.stderr
    assert "port 0 is any that is free" in ran.stderr


def test_wrong_usage_is_told() -> None:
    assert "65535" in filao_sandbox("--port", "70000").stderr
    assert "soon guessed" in filao_sandbox(FILAO_TOKEN="short").stderr
    assert filao_sandbox("--token", "correct-horse").returncode == 2


def test_open_to_other_machines_it_runs_no_code_unless_asked_to(tmp_path) -> None:
    for arguments, allowed in (((), False), (("--allow-code",), True)):
        with sandbox(tmp_path / f"files{allowed}", "--host", "0.0.0.0", *arguments) as running:
            address = running.url.replace("0.0.0.0", "127.0.0.1")
            with httpx.Client(follow_redirects=True) as client:
                page = client.get(f"{address}en?token={TOKEN}").text
            assert f'"may_run_code":{str(allowed).lower()}' in page
