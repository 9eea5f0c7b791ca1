"""The example works as its page says; each guarantee holds under fire; and the checker goes red on forged books."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from tests.torture.insurer import GUARANTEES, Submitted, check, play, real_claims

ROOT = Path(__file__).parents[1]
KILLS = 10
CLAIMS = 2_664  # a tenth of the file


def test_one_command_runs_it_all(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.insurance",
        "--folder",
        str(tmp_path),
        "--claims",
        "8",
        "--policies",
        "2",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "6 claims paid, 2 refused, 0 not settled" in run.stdout
    assert "2 of 2 policies printed" in run.stdout
    for number in (1, 2):
        assert (tmp_path / "documents" / f"policy-{number}.pdf").read_bytes().startswith(b"%PDF-")
    with closing(sqlite3.connect(tmp_path / "business.db")) as business:
        assert business.execute("SELECT count(*), count(DISTINCT claim) FROM letter").fetchone() == (8, 8)


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_the_guarantee_holds_while_portal_relay_and_workers_are_killed(tmp_path, guarantee) -> None:
    claims = real_claims(CLAIMS)
    company = play(tmp_path / guarantee, guarantee, claims, KILLS, Random(1))
    verdict = check(tmp_path / guarantee, guarantee, claims)
    assert company.kills.total() == KILLS
    assert verdict.complaints == []
    assert verdict.confirmed == len(claims)


# --- forgeries -------------------------------------------------------------------------------------------------------

SENT = [Submitted("a", 1, 100), Submitted("b", 1, 250)]


@pytest.fixture
def books(tmp_path: Path) -> Generator[sqlite3.Connection]:
    """Return the books of two claims that were confirmed and paid once each."""
    (tmp_path / "confirmed").write_text("a 100\nb 250\n")
    with closing(sqlite3.connect(tmp_path / "business.db", isolation_level=None)) as business:
        business.execute("CREATE TABLE claim (id INTEGER PRIMARY KEY, reference TEXT, amount INTEGER)")
        business.execute("CREATE TABLE payment (claim INTEGER, amount INTEGER)")
        business.execute("INSERT INTO claim VALUES (1, 'a', 100), (2, 'b', 250)")
        business.execute("INSERT INTO payment VALUES (1, 100), (2, 250)")
        yield business


FORGERIES = {
    "nothing": ("SELECT 1", {}),
    "a payment is lost": (
        "DELETE FROM payment WHERE claim = 2",
        {"at-least-once": "never paid", "exactly-once": "never paid"},
    ),
    "a payment is doubled": (
        "INSERT INTO payment VALUES (1, 100)",
        {"at-most-once": "more than once", "exactly-once": "more than once"},
    ),
    "a payment is wrong": (
        "UPDATE payment SET amount = 99 WHERE claim = 1",
        {"exactly-once": "paid 349 cents, of 350"},
    ),
    "a claim is gone": ("DELETE FROM claim WHERE id = 2", dict.fromkeys(GUARANTEES, "not in the database")),
}


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_the_checker_sees_what_is_wrong_with_the_books(tmp_path, books, forgery, guarantee) -> None:
    statement, wanted = FORGERIES[forgery]
    books.execute(statement)
    complaints = "; ".join(check(tmp_path, guarantee, SENT).complaints)
    if guarantee in wanted:
        assert wanted[guarantee] in complaints
    else:
        assert complaints == ""


def test_the_checker_sees_a_claim_that_was_never_confirmed(tmp_path, books) -> None:
    (tmp_path / "confirmed").write_text("a 100\n")
    assert "1 claims were never confirmed" in "; ".join(check(tmp_path, "at-most-once", SENT).complaints)


# --- the portal ------------------------------------------------------------------------------------------------------


def test_the_portal_refuses_what_is_no_claim_and_answers_a_repeated_request_alike(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INSURANCE_FOLDER", str(tmp_path))
    script = """
        import json
        from starlette.testclient import TestClient
        from examples.insurance.portal import app

        with TestClient(app) as client:
            good = {"reference": "r1", "policy": 12, "type": "storm", "amount": 12000}
            answers = [client.post("/claims", content=body) for body in (
                json.dumps(good), json.dumps(good), "not JSON", "[]", json.dumps(good | {"amount": -1}),
                json.dumps(good | {"policy": "twelve"}), "\\xff")]
            answers += [client.get("/claims/1"), client.get("/claims/99"), client.post("/policies/", content="{}")]
            print(json.dumps([[answer.status_code, answer.json()] for answer in answers]))
    """
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert [code for code, _ in answers] == [202, 202, 422, 422, 422, 422, 422, 200, 404, 422]
    assert answers[0][1] == answers[1][1] == {"status": "submitted", "claim_id": 1}
    assert answers[7][1]["status"] == "submitted"


def test_whatever_is_sent_to_the_portal_the_answer_blames_the_sender(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INSURANCE_FOLDER", str(tmp_path))
    script = """
        import json
        from starlette.testclient import TestClient
        from examples.insurance.portal import app

        with TestClient(app) as client:
            good = {"reference": "r1", "policy": 12, "type": "storm", "amount": 12000}
            whole, digits, deep = json.dumps(good), "9" * 5_000, "[" * 100_000
            def endless():
                for _ in range(100):
                    yield b" " * 4_096
            answers = [client.post("/claims", content=body) for body in (
                whole.replace("storm", r"\\ud800"), whole.replace("r1", r"\\udfff"), whole.replace("12000", digits),
                whole.replace("12,", digits + ","), whole.replace("12000", "1e400"), deep, deep.replace("[", '{"a":'),
                whole.replace("12000", "true"), whole.replace("r1", "r" * 300), whole.replace("storm", ""),
                "{" * 10, whole + "x", b"\\x00", b"")]
            answers += [client.get("/claims/" + number) for number in (digits, "-1", "1e3", "%00", "%F0%9F%8E%B2", "²")]
            unreadable = (deep, r'{"holder": "\\ud800"}', '{"holder": 7}')
            answers += [client.post("/policies/", content=body) for body in unreadable]
            answers += [client.post(path, content=endless()) for path in ("/claims", "/policies/")]
            answers += [client.post("/claims", content=body) for body in (
                whole, whole, whole.replace("12000", "5"), whole.replace("12,", "13,"))]
            print(json.dumps([[answer.status_code, answer.json()] for answer in answers]))
    """
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert [code for code, _ in answers[:-4]] == [
        *[422] * 5,
        *[413] * 2,
        *[422] * 7,
        *[404] * 6,
        413,
        422,
        422,
        413,
        413,
    ]
    first, again, other_content, other_policy = answers[-4:]
    assert first == again == [202, {"status": "submitted", "claim_id": 1}]
    assert other_content[0] == 409
    assert other_policy == [202, {"status": "submitted", "claim_id": 2}]  # nobody is told of another's claim


def test_the_simple_versions_are_those_of_the_mission(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INSURANCE_FOLDER", str(tmp_path))
    script = """
        import asyncio, filao
        from examples.insurance import claims, portal, settings

        async def main():
            async with filao.connect(settings.QUEUES) as broker:
                await broker.declare(settings.claims)
                hail = {"reference": "r", "policy": 1, "type": "hail", "amount": 5}
                answer = await portal.submit_simply(broker, hail)
                await claims.process_simply(broker)
                claim = await portal.db.get_claim(answer["claim_id"])
                stats = await broker.stats("claims.processing")
                print(answer["status"], claim.state, stats.acked)

        asyncio.run(main())
    """
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.split() == ["submitted", "paid", "1"], run.stderr
