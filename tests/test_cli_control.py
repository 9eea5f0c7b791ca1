"""The command line pauses, resumes, cancels and deletes."""

import filao
import filao.sync
from tests.support.shell import compiled, db, declare, on_terminal, put, run

__all__ = ["compiled", "db"]


def test_a_queue_is_paused_and_resumed(db):
    put(db, 7)
    assert run("pause", db, "claims").lines == [{"paused": "claims"}]
    assert run("receive", db, "claims").code == 1
    assert run("resume", db, "claims").lines == [{"resumed": "claims"}]
    assert run("receive", db, "claims").code == 0


def test_a_halted_group_is_resumed(db):
    declare(db, "claims", group_dead="halt")
    with filao.sync.connect(db) as broker:
        broker.send_many("claims", [1, 2], group="policy-12")
        broker.receive_from_queue("claims").reject()
    assert run("receive", db, "claims").code == 1
    assert run("resume", db, "claims", "--group", "policy-12").code == 0
    assert run("receive", db, "claims").lines[0]["body"] == 2


def test_one_message_is_cancelled_while_it_waits(db):
    number, other = put(db, 7, 8)
    first, second = run("cancel", db, "claims", number), run("cancel", db, "claims", number)
    assert (first.code, first.lines) == (0, [{"cancelled": True}])
    assert (second.code, second.lines) == (1, [{"cancelled": False}])
    assert run("cancel", "claims", other, url=str(db)).code == 0


def test_a_queue_is_deleted_with_its_messages_only_when_told(db):
    put(db, 7)
    assert run("delete", db, "claims", "--messages").code == 2  # nobody can be asked
    assert "holds 1 message: " in run("delete", db, "claims", "--yes").err
    code, screen = on_terminal("delete", db, "claims", "--messages", types=b"n\n", when=b"[y/N]")
    assert (code, "and its 1 message?" in screen) == (1, True)
    assert run("delete", db, "claims", "--messages", "--yes").lines == [{"deleted": "claims"}]
    assert "is not declared" in run("peek", db, "claims").err
