"""The command line shows what is stored, sends it back and deletes it."""

import json
import re
from collections.abc import Sequence

import pytest

import filao
import filao.sync
from filao.cli import stored
from tests.support.shell import (
    ENVIRONMENT,
    bury,
    compiled,
    counted,
    db,
    declare,
    on_terminal,
    put,
    run,
    run_each,
    sent_to_terminal,
    waiting,
)

__all__ = ["compiled", "db"]


def test_peek_pages_through_a_state_and_changes_nothing(db):
    ids = put(db, *range(5))
    options = [("--limit", "2"), ("--after", ids[1]), ("--state", "delayed")]
    first, second, delayed = run_each(("peek", db, "claims", *chosen) for chosen in options)
    assert [line["id"] for line in first.lines] == ids[:2]
    assert [line["body"] for line in second.lines] == [2, 3, 4]
    assert (delayed.code, delayed.out) == (1, b"")
    assert counted(db).ready == 5


def test_dead_letters_tell_why_they_died(db):
    declare(db, "appeals")
    bury(db, {"claim_id": 7}, b"\xff")
    found, none = run_each([("dead", db, "claims"), ("dead", db, "appeals")])
    first, second = found.lines
    assert (first["body"], first["reason"], first["error"]) == ({"claim_id": 7}, "rejected", "no such policy")
    assert [failure["outcome"] for failure in first["history"]] == ["rejected"]
    assert second["body"] == {"base64": "/w=="}
    assert none.code == 1


def test_dead_letters_are_chosen_by_reason_error_age_and_id(db):
    ids = bury(db, *range(3))
    declare(db, "claims", ttl=0.001)
    with filao.sync.connect(db) as broker:
        broker.send_to_queue("claims", 3)
        while broker.receive_from_queue("claims", wait=0) or broker.stats("claims").dead < 4:
            pass
    asked = [
        ("--reason", "expired"),
        ("--error", "NO SUCH"),
        ("--error", "no such", "--limit", "2"),
        ("--older", "3600"),
        ("--younger", "3600"),
        ("--id", ids[1]),
    ]
    found = run_each(("dead", db, "claims", *options) for options in asked)
    assert [[line["body"] for line in ran.lines] for ran in found] == [[3], [0, 1, 2], [0, 1], [], [0, 1, 2, 3], [1]]
    assert "queue 'claims' has no such dead letters" in found[3].err


def test_peek_finds_a_message_by_its_id_in_whatever_state(db):
    (letter,) = bury(db, "dead")
    with filao.sync.connect(db) as broker:
        later = broker.send_to_queue("claims", "delayed", delay=3_600).id
    asked = [(later,), (letter,), (letter, "--state", "ready"), ("nonsense",)]
    found = run_each(("peek", db, "claims", "--id", *options) for options in asked)
    assert [[line["body"] for line in ran.lines] for ran in found] == [["delayed"], ["dead"], [], []]
    assert f"queue 'claims' has no ready message {letter!r}" in found[2].err
    assert "queue 'claims' has no message 'nonsense'" in found[3].err


def test_dead_letters_are_a_table_on_a_terminal_and_one_is_told_whole(db):
    (number,) = bury(db, {"claim_id": 7})
    code, screen = on_terminal("dead", db, "claims")
    assert code == 0
    assert re.search(rf"{number}.*rejected.*no such", screen)
    code, screen = on_terminal("dead", db, "claims", "--id", number)
    assert (code, '{"claim_id":7}' in screen, "  no such policy" in screen) == (0, True, True)
    code, screen = on_terminal("dead", db, "claims", "--json")
    assert json.loads(screen)["id"] == number


def test_of_an_error_of_several_lines_the_tables_show_the_one_that_names_it(db):
    run("declare", db, "claims", "--history")
    put(db, 1)
    with filao.sync.connect(db) as broker:
        message = broker.receive_from_queue("claims", wait=0)
        assert message is not None
        message.reject(ValueError("there is one\nDETAIL:  Key (id)=(1) already exists."))
    for command in (("dead", db, "claims"), ("trace", db, message.id)):
        code, screen = on_terminal(*command)
        assert (code, "ValueError" in screen, "DETAIL" in screen) == (0, True, False)


def test_what_others_wrote_does_nothing_in_a_table_or_a_story(db):
    put(db, "\x1b[2J[red]")
    (number,) = [line["id"] for line in run("peek", db, "claims").lines]
    for options in ((), ("--id", number)):
        code, screen = sent_to_terminal("peek", db, "claims", *options)
        assert code == 0
        assert "\x1b[2J" not in screen
        assert "[red]" in screen


def test_what_a_terminal_has_no_sign_for_is_escaped_in_a_table(db, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    put(db, "é 日本")
    code, screen = on_terminal("peek", db, "claims")
    assert (code, "\\xe9 \\u65e5" in screen) == (0, True)


def test_an_empty_result_says_so(db):
    for command, told in [
        ("peek", "queue 'claims' has no ready messages"),
        ("dead", "queue 'claims' has no dead letters"),
    ]:
        ran = run(command, db, "claims")
        assert (ran.code, ran.out) == (1, b"")
        assert told in ran.err


def test_the_hint_names_the_queue_that_was_meant(db, tmp_path):
    assert f"filao declare {db} claim-s." in run("peek", db, "claim-s").err
    assert "c.db claims" in run("peek", tmp_path / "c.db", "claims").err


def test_redrive_sends_back_all_or_some(db):
    ids = bury(db, *range(4))
    assert run("redrive", db, "claims", "--id", ids[1], "--id", ids[2]).lines == [{"redriven": 2}]
    ones = run_each([("redrive", db, "claims", "--limit", "1")] * 3)
    assert sorted((ran.code, ran.lines[0]["redriven"]) for ran in ones) == [(0, 1), (0, 1), (1, 0)]
    assert waiting(db) == [0, 1, 2, 3]


def test_redrive_tells_of_ids_that_it_did_not_find(db):
    (letter,) = bury(db, 1)
    ran = run("redrive", db, "claims", "--id", letter, "--id", "nonsense")
    assert (ran.code, ran.lines) == (1, [{"redriven": 1}])
    assert "1 of 2 ids" in ran.err
    assert "queue 'claims' has no dead letter 'nonsense'" in run("redrive", db, "claims", "--id", "nonsense").err


def test_redrive_edits_the_body_of_one(db):
    (letter,) = bury(db, {"claim_id": "seven"})
    command = ("redrive", db, "claims", "--body", '{"claim_id": 7}')
    assert [ran.code for ran in run_each([command, (*command, "--id", letter)])] == [2, 0]
    assert waiting(db) == [{"claim_id": 7}]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_what_is_interrupted_half_way_says_how_far_it_came(error, capfd, monkeypatch):
    monkeypatch.setattr(stored, "_SEARCHED_AT_ONCE", 1)

    def work(ids: Sequence[str]) -> int:
        if "b" in ids:
            raise error
        return len(ids)

    with pytest.raises(type(error)):
        stored._in_slices(["a", "b", "c"], None, work)
    assert "filao: 1 message is done, of 3; what was under way" in capfd.readouterr().err


def test_redrive_and_discard_choose_a_kind_and_keep_to_a_rate(db):
    ids = bury(db, *range(4))
    assert run("redrive", db, "claims", "--kind", "Other", "--rate", "100").lines == [{"redriven": 0}]
    done = run("redrive", db, "claims", "--kind", "no such policy", "--rate", "100", "--limit", "2")
    assert done.lines == [{"redriven": 2}]
    assert waiting(db) == [0, 1]
    asked, by_id = run_each([("discard", db, "claims", "--reason", "rejected"), ("discard", db, "claims", "--yes")])
    assert (asked.code, by_id.code) == (2, 2)
    assert run("discard", db, "claims", "--id", ids[2], "--yes").lines == [{"discarded": 1}]
    assert (counted(db).dead, counted(db).cancelled) == (1, 1)


def test_what_another_discards_meanwhile_ends_no_search_through_the_others(db, monkeypatch):
    """Of an id that its sender gave, nothing told any more where the next page begins."""
    monkeypatch.setattr(stored, "_SEARCHED_AT_ONCE", 2)
    with filao.sync.connect(db) as broker:
        for number in range(6):
            broker.send_to_queue("claims", number, message_id=f"claim-{number}")
            broker.receive_from_queue("claims").reject("no")
        found = []
        for letter in stored._search(broker, "claims", filao.State.DEAD, lambda _: True, after=None, limit=100):
            found.append(letter.id)
            if letter.id in ("claim-1", "claim-3"):
                broker.discard("claims", ids=[letter.id])
    assert found == [f"claim-{number}" for number in range(6)]


def test_purge_asks_and_refuses_where_it_cannot(db):
    put(db, 1, 2)
    asked, of_dead = run_each([("purge", db, "claims"), ("purge", db, "claims", "--state", "dead", "--yes")])
    assert (asked.code, of_dead.lines) == (2, [{"purged": 0}])
    assert "--yes" in asked.err
    assert run("purge", db, "claims", "--yes").lines == [{"purged": 2}]


def test_purge_does_what_is_answered_on_a_terminal(db):
    put(db, 1, 2)
    code, screen = on_terminal("purge", db, "claims", types=b"n\n", when=b"[y/N]")
    assert "Delete 2 waiting messages of queue 'claims'?" in screen
    assert (code, counted(db).ready) == (1, 2)
    code, screen = on_terminal("purge", db, "claims", types=b"y\n", when=b"[y/N]")
    assert (code, counted(db).ready) == (0, 0)
    assert '{"purged":2}' in screen
