"""The command line sends: one body, lines, files, whole messages."""

import json
import os
import pty
import subprocess

import pytest

import filao
import filao.sync
from filao.message import delivery_of
from filao.sync import inner_of
from tests.support.shell import (
    PATIENCE,
    compiled,
    counted,
    db,
    declare,
    line_of,
    on_terminal,
    run,
    run_each,
    started,
    waiting,
)

__all__ = ["compiled", "db"]


def test_a_body_that_is_too_large_is_refused_with_its_line(db):
    ran = run("send", db, "claims", given=b'1\n"' + b"x" * 300 * 1024 + b'"\n3\n')
    assert ran.code == 3
    assert "line 2: queue 'claims': the body takes 307,202 bytes and the limit is 262,144" in ran.err
    assert waiting(db) == [1]


def test_a_body_that_is_not_json_is_refused(db):
    ran = run("send", db, "claims", "{claim_id: 7}")
    assert ran.code == 3
    assert "'{claim_id: 7}' is not JSON" in ran.err
    assert waiting(db) == []


@pytest.mark.parametrize("depth", [201, 3_000, 50_000])  # how many Python's reader bears differs with its version
@pytest.mark.parametrize("option", [(), ("--messages",)])
def test_a_json_text_that_is_nested_too_deeply_is_not_said_to_be_none(db, option, depth):
    deep = b"[" * depth + b"]" * depth
    given = b'{"body":1}\n{"body":' + deep + b"}" if option else b"1\n" + deep
    ran = run("send", db, "claims", *option, given=given)
    assert (ran.code, waiting(db)) == (3, [1])
    assert ran.err.endswith("line 2: the JSON text is nested more than 200 deep\n")


def test_a_bad_line_stops_behind_all_that_stand_before_it(db):
    given = b"".join(b"%d\n" % number for number in range(1, 1_501)) + b"{bad\n" + b"0\n" * 100
    ran = run("send", db, "claims", given=given)
    assert ran.code == 3
    assert "line 1501: '{bad' is not JSON" in ran.err
    assert "stored 1,500 messages, lines 1 to 1,500" in ran.err
    assert waiting(db) == list(range(1, 1_501))
    assert len(ran.lines) == 1_500


def test_a_queue_that_is_full_tells_how_far_it_came(db):
    declare(db, max_length=1_500)
    given = b"".join(b"%d\n" % number for number in range(1, 2_001))
    ran = run("send", db, "claims", "--quiet", given=given)
    assert ran.code == 3
    assert "is full" in ran.err
    stored = len(waiting(db))
    assert 1_000 <= stored <= 1_500
    assert f"stored {stored:,} messages, lines 1 to {stored:,}" in ran.err


def test_send_prints_a_receipt(db):
    terms = [
        "--header",
        "source=portal=1",
        "--group",
        "policy-12",
        "--priority",
        "-5",
        "--ttl",
        "9000",
        "--delay",
        "3600",
    ]
    (receipt,) = run("send", db, "claims", '{"claim_id": 7}', *terms).lines
    with filao.sync.connect(db) as broker:
        (message,) = broker.peek("claims", state="delayed")
    assert receipt == {"id": message.id, "duplicate": False}
    assert message.body == {"claim_id": 7}
    assert (message.headers, message.group, message.priority) == ({"source": "portal=1"}, "policy-12", -5)
    assert message.expires_at is not None
    assert (message.at - message.sent_at).total_seconds() == 3600
    assert (message.expires_at - message.sent_at).total_seconds() == 9000


def test_a_duplicate_is_told_in_the_receipt(db):
    command = ("send", db, "claims", "1", "--message-id", "mine", "--dedup-key", "claim-7")
    receipts = [ran.lines[0] for ran in run_each([command, command])]
    assert [receipt["id"] for receipt in receipts] == ["mine", "mine"]
    assert sorted(receipt["duplicate"] for receipt in receipts) == [False, True]


def test_the_text_of_a_body_is_kept_as_it_was_written(db):
    run("send", db, "claims", '{"amount": 1.10, "policy": 123456789012345678901234567890}')
    with filao.sync.connect(db) as broker:
        message = broker.receive_from_queue("claims", wait=0)
        assert message is not None
        assert delivery_of(inner_of(message)).content == b'{"amount": 1.10, "policy": 123456789012345678901234567890}'


def test_lines_are_sent_in_their_order_and_blank_ones_passed_over(db):
    ran = run("send", db, "claims", given=b'1\r\n\n{"claim_id": 2}\n  \n"three"')
    assert len(ran.lines) == 3
    assert waiting(db) == [1, {"claim_id": 2}, "three"]


def test_a_file_is_loaded_with_one_summary_when_quiet(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"".join(b'{"claim_id": %d}\n' % number for number in range(2_500)))
    ran = run("send", db, "claims", "--file", tmp_path / "claims.jsonl", "--quiet")
    assert ran.lines == [{"sent": 2_500, "duplicates": 0}]
    assert ran.err == ""
    assert waiting(db) == [{"claim_id": number} for number in range(2_500)]


def test_raw_lines_are_sent_untouched(db):
    run("send", db, "claims", "--raw", given=b"\xff\xfe\n\n{not json \r\n")
    assert waiting(db) == [b"\xff\xfe", b"", b"{not json \r"]


def test_a_line_is_sent_before_the_next_one_comes(db):
    with started("send", db, "claims", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"1\n2")
        line_of(process)
        assert waiting(db) == [1]
        process.stdin.write(b"\n")
        line_of(process)
        assert waiting(db) == [1, 2]


def test_options_that_contradict_each_other_are_wrong_usage(db):
    sends = [
        ["1", "--messages"],
        ["--raw", "--messages"],
        ["--message-id", "m"],
        ["--header", "x"],
    ]
    receives = [["--all", "--limit", "1"], ["--follow", "--wait", "1"]]
    commands = [("send", db, "claims", *options) for options in sends]
    commands += [("receive", db, "claims", *options) for options in receives]
    assert [ran.code for ran in run_each(commands)] == [2] * len(commands)
    assert counted(db).sent == 0


def test_whole_messages_have_terms_of_their_own(db):
    lines = b"""{"body": 1, "group": "a", "headers": {"x": "1"}}
        {"body": null, "dedup_key": "k"}
        {"body": 3, "dedup_key": "k"}"""
    ran = run("send", db, "claims", "--messages", "--group", "b", "--header", "y=2", given=lines)
    assert [receipt["duplicate"] for receipt in ran.lines] == [False, False, True]
    with filao.sync.connect(db) as broker:
        first, second = broker.peek("claims")
    assert (first.body, first.group, first.headers) == (1, "a", {"x": "1", "y": "2"})
    assert (second.body, second.group, second.headers) == (None, "b", {"y": "2"})


def test_a_line_that_is_no_whole_message_is_refused(db, tmp_path):
    lines = (
        b'{"bodi": 1}',
        b'{"body": 1, "priority": "5"}',
        b'{"body": 1, "bytes": true}',
        b"[]",
        b'{"body": 1, "delay": -1}',
    )
    for number, line in enumerate(lines):
        (tmp_path / str(number)).write_bytes(b'{"body": 0}\n' + line)
    files = [tmp_path / str(number) for number in range(len(lines))]
    for ran in run_each(("send", db, "claims", "--messages", "--file", file) for file in files):
        assert ran.code == 3
        assert "filao: line 2: " in ran.err
    assert waiting(db) == [0] * len(lines)


def test_loading_a_file_on_a_terminal_shows_progress_and_a_summary(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"7\n" * 3_000)
    code, screen = on_terminal("send", db, "claims", "--file", tmp_path / "claims.jsonl")
    assert code == 0
    assert "sending" in screen
    assert "100%" in screen
    assert "3,000 messages" in screen
    assert '{"sent":3000,"duplicates":0}' in screen
    assert 'duplicate":' not in screen.replace('{"sent":3000,"duplicates":0}', "")


def test_progress_is_drawn_on_stderr_alone(db, tmp_path):
    (tmp_path / "claims.jsonl").write_bytes(b"7\n" * 10)
    terminal, inside = pty.openpty()
    with started("send", db, "claims", "--file", tmp_path / "claims.jsonl", stderr=inside) as process:
        os.close(inside)
        assert process.stdout is not None
        receipts = process.stdout.read().splitlines()
        assert b"sending" in os.read(terminal, 65_536)
        assert process.wait(PATIENCE) == 0
    os.close(terminal)
    assert all(json.loads(receipt)["duplicate"] is False for receipt in receipts)
    assert len(receipts) == 10


def test_lines_are_typed_on_a_terminal_until_it_is_interrupted(db):
    code, screen = on_terminal("send", db, "claims", types=b"7\n\x04", when=b"Ctrl-D ends them")
    assert code == 0
    assert '"duplicate":false' in screen
    code, screen = on_terminal("send", db, "claims", types=b"\x03", when=b"Ctrl-D ends them")
    assert (code, waiting(db)) == (130, [7])
    assert "stored nothing" in screen
    assert "Traceback" not in screen
