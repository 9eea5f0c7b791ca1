"""The command line counts, and examines."""

import re

import filao
import filao.sync
from tests.support.shell import ENVIRONMENT, compiled, db, declare, on_terminal, put, run, run_each

__all__ = ["compiled", "db"]


def test_stats_are_json_lines_in_a_pipe(db):
    declare(db, "appeals")
    put(db, 1, 2)
    every, alone = run_each([("stats", db), ("stats", db, "claims")])
    assert [(line["name"], line["ready"], line["sent"]) for line in every.lines] == [
        ("appeals", 0, 0),
        ("claims", 2, 2),
    ]
    assert [line["name"] for line in alone.lines] == ["claims"]


def test_stats_without_a_queue_found_fail(tmp_path):
    with filao.sync.connect(tmp_path / "empty.db"):
        pass
    assert run("stats", tmp_path / "empty.db").code == 1


def test_stats_are_a_table_on_a_terminal(db):
    put(db, *range(1_234))
    code, screen = on_terminal("stats", db)
    assert code == 0
    assert "───" in screen
    assert "1,234" in screen
    _, screen = on_terminal("stats", db, "claims")
    assert "redriven" in screen


def test_a_table_keeps_its_columns_on_a_terminal_that_lacks_signs(db, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    with filao.sync.connect(db) as broker:
        broker.send_many("claims", ["body"], group="é")
        broker.send_many("claims", ["body"], group="e")
    _, screen = on_terminal("peek", db, "claims")
    strange, plain = (line for line in screen.splitlines() if "body" in line and "sent" not in line)
    assert "xe9" in strange
    assert strange.index('"') == plain.index('"'), screen


def test_no_figure_is_cut_on_a_narrow_terminal(db, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "COLUMNS", "40")
    declare(db, "claims.with.a.rather.long.name")
    with filao.sync.connect(db) as broker:
        broker.send_many("claims.with.a.rather.long.name", [1] * 9_999)
    _, screen = on_terminal("stats", db)
    assert re.search(r"claims\S+ +9,999 +0 +0 +0 +0 +9,999 +0", screen)
    _, screen = on_terminal("peek", db, "claims.with.a.rather.long.name")
    assert len(re.findall(r"[0-9a-f]{16}-\d+ ", screen)) == 10


def test_doctor_prints_json_lines_in_a_pipe_or_a_table_on_a_terminal(db):
    db.chmod(0o644)
    ran = run("doctor", db)
    findings = {finding["subject"]: finding["level"] for finding in ran.lines}
    assert (findings["permissions"], findings["integrity"], ran.code) == ("warning", "ok", 0)
    code, screen = on_terminal("doctor", db)
    assert code == 0
    assert "───" in screen
    assert "permissions" in screen


def test_doctor_tells_of_a_server_that_cannot_be_reached():
    ran = run("doctor", "amqp://guest:guest@127.0.0.1:1/")
    assert ran.code == 1
    (finding,) = ran.lines
    assert (finding["level"], finding["subject"]) == ("error", "opening")
    assert "127.0.0.1:1" in finding["text"]


def test_doctor_fails_on_a_damaged_file(db):
    put(db, *("x" * 1_000 for _ in range(100)))
    pages = bytearray(db.read_bytes())
    pages[-4096 * 8 :] = b"\xff" * 4096 * 8
    db.write_bytes(pages)
    ran = run("doctor", db)
    assert ran.code == 1
    assert "error" in {finding["level"] for finding in ran.lines}
