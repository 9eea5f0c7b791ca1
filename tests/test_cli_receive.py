"""The command line receives: it acknowledges what was written, and no more."""

import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest

import filao
import filao.sync
from tests.support.shell import PATIENCE, PIPE_FULL, compiled, counted, db, declare, line_of, put, run, started, waiting

__all__ = ["compiled", "db"]


def test_receive_takes_one_message_and_acknowledges_it(db):
    first, _ = put(db, {"claim_id": 7}, 8)
    (line,) = run("receive", db, "claims").lines
    assert (line["id"], line["queue"], line["attempt"], line["headers"]) == (first, "claims", 1, {})
    assert (line["body"], line["bytes"]) == ({"claim_id": 7}, False)
    assert (counted(db).acked, waiting(db)) == (1, [8])


def test_bytes_are_received_as_base64_with_a_mark(db):
    put(db, b"\xff", {"base64": "/w=="})
    lines = run("receive", db, "claims", "--all").lines
    assert [(line["body"], line["bytes"]) for line in lines] == [
        ({"base64": "/w=="}, True),
        ({"base64": "/w=="}, False),
    ]


def test_receive_fails_when_there_is_nothing(db):
    ran = run("receive", db, "claims", "--wait", "0.01")
    assert (ran.code, ran.out, ran.err) == (1, b"", "")
    put(db, 1)
    with filao.sync.connect(db) as broker:
        broker.pause("claims")
    ran = run("receive", db, "claims")
    assert (ran.code, "queue 'claims' is paused" in ran.err) == (1, True)


def test_receive_stops_at_its_limit_or_when_the_queue_is_empty(db):
    put(db, *range(250))
    assert [line["body"] for line in run("receive", db, "claims", "--limit", "120").lines] == list(range(120))
    assert [line["body"] for line in run("receive", db, "claims", "--all").lines] == list(range(120, 250))
    assert counted(db).acked == 250


def test_bodies_alone_are_printed_raw(db):
    put(db, {"claim_id": 7}, b"\xff\xfe")
    assert run("receive", db, "claims", "--raw", "--all").out == b'{"claim_id":7}\n\xff\xfe\n'


def test_at_most_once_deletes_before_it_prints(db):
    put(db, 1)
    with Path(os.devnull).open("rb") as unwritable:
        assert run("receive", db, "claims", "--at-most-once", stdout=unwritable).code == 4
    put(db, 2, 3)
    assert [line["body"] for line in run("receive", db, "claims", "--at-most-once", "--all").lines] == [2, 3]
    assert counted(db).acked == 3


def test_what_cannot_be_written_is_not_acknowledged(db):
    put(db, 1, 2)
    with Path(os.devnull).open("rb") as unwritable:
        ran = run("receive", db, "claims", "--all", stdout=unwritable)
    assert ran.code == 4
    assert ran.err.startswith("filao: stdout: ")
    stats = counted(db)
    assert (stats.ready, stats.acked, stats.released) == (2, 0, 2)


def test_a_reader_that_goes_away_leaves_the_rest_in_the_queue(db):
    put(db, *("x" * PIPE_FULL for _ in range(3)))
    with started("receive", db, "claims", "--all") as process:
        line_of(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""
    stats = counted(db)
    assert (stats.acked, stats.ready) == (1, 2)
    with filao.sync.connect(db) as broker:
        assert [message.attempts for message in broker.peek("claims")] == [0, 0]


def test_what_a_slow_reader_has_not_taken_goes_back_meanwhile(db):
    put(db, 1, 2, 3)
    impatient = "import filao.cli, sys; sys.modules['filao.cli.receive'].SLOW_AFTER = 0; filao.cli.main()"
    ran = run("receive", db, "claims", "--all", program=[sys.executable, "-c", impatient])
    assert [(line["body"], line["attempt"]) for line in ran.lines] == [(1, 1), (2, 1), (3, 1)]
    stats = counted(db)
    assert (stats.acked, stats.released) == (3, 3)


def test_a_lease_that_ran_out_before_the_reader_came_is_told(db):
    declare(db, lease=0.05)
    put(db, "x" * PIPE_FULL)
    with started("receive", db, "claims") as process, filao.sync.connect(db) as broker:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], PATIENCE)[0]
        message = broker.receive_from_queue("claims", wait=PATIENCE, lease=60)
        assert message is not None
        assert message.attempt == 2
        out, err = process.communicate(timeout=PATIENCE)
        assert json.loads(out)["attempt"] == 1
        assert b"filao: the reader was slower than the lease" in err
        assert process.returncode == 0
        message.ack()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_follow_waits_until_it_is_stopped_and_leaves_nothing_leased(db, number, code):
    with started("receive", db, "claims", "--follow") as process:
        put(db, 1)
        assert json.loads(line_of(process))["body"] == 1
        put(db, 2)
        assert json.loads(line_of(process))["body"] == 2
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    stats = counted(db)
    assert (stats.leased, stats.acked + stats.ready) == (0, 2)
    assert stats.lost == 0


def test_follow_with_a_limit_ends_there(db):
    with started("receive", db, "claims", "--follow", "--limit", "2") as process:
        put(db, 1)
        line_of(process)
        put(db, 2)
        line_of(process)
        assert process.wait(PATIENCE) == 0
