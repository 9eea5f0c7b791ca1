"""A room without a page: its consumers are real processes, which come and go while others work."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import closing
from datetime import UTC, datetime

import pytest

import filao
from filao.engine import State, StoredMessage
from filao.sandbox import scene, visits
from filao.sandbox.effects import Payment
from filao.sandbox.journal import Record, What, journal_of
from filao.sandbox.lanes import Lane
from filao.sandbox.lesson import Facts, Mark, mark
from filao.sandbox.room import Room, RoomError
from filao.sandbox.rows import Rows
from filao.sandbox.steps import STEPS
from filao.sandbox.view import View
from filao.sandbox.visits import Visit
from tests.support.learner import PATIENCE, until_soon

pytestmark = pytest.mark.anyio


@pytest.fixture
async def room(tmp_path) -> AsyncGenerator[Room]:
    folder = tmp_path / "room"
    folder.mkdir()
    async with Room(folder) as opened:
        await opened.create()
        yield opened


async def until_seen(room: Room, lane: Lane, state: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while lane.state != state:
            await room.look()
            await asyncio.sleep(0.02)


async def test_a_consumer_that_is_sent_home_while_it_starts_does_not_come_back(room) -> None:
    lane = room.add_consumer()
    room.remove_consumer()
    assert room.lanes.living() == []
    journal = journal_of(room.folder, lane.number)
    await until_soon(lambda: journal.exists() and "started" in journal.read_text())
    await room.look()
    assert room.lanes.living() == []
    await until_seen(room, lane, "gone")
    assert Facts(room, mark(room)).consumers == 0


async def test_a_consumer_that_is_sent_home_with_a_claim_in_hand_gives_it_back_and_was_not_killed(room) -> None:
    await room.change(work=60.0)
    since = mark(room)
    lane = room.add_consumer()
    await room.submit([room.customers.case()])
    await until_seen(room, lane, "working")
    room.remove_consumer()
    assert Facts(room, since).killed() is None
    with pytest.raises(RoomError):
        room.kill(lane.number)
    await until_seen(room, lane, "gone")
    assert [lease.how for lease in lane.leases] == ["released"]
    assert "killed" not in [move.what for move in room.lanes.moves]


async def test_a_world_that_cannot_be_frozen_whole_goes_on(room) -> None:
    lanes = [room.add_consumer(), room.add_consumer()]
    for lane in lanes:
        await until_seen(room, lane, "waiting")
    os.kill(lanes[1].pid, signal.SIGKILL)  # and no look has found it yet
    with pytest.raises(RoomError) as raised:
        await room.freeze()
    assert raised.value.key == "no_consumer"
    assert not room.is_frozen
    await room.submit([room.customers.case(effort=0.01)])
    async with asyncio.timeout(PATIENCE):
        while not lanes[0].handled:
            await room.look()


async def test_the_row_of_a_send_is_as_the_send_left_it_though_a_consumer_has_the_message(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        receipt = await broker.send_to_queue("claims", {"claim_id": 1})
        with closing(Rows(path)) as rows:
            ready = rows.row(receipt.id)
            await broker.receive_from_queue("claims")
            assert '"state":"leased"' in rows.row(receipt.id)
            assert rows.row(receipt.id, as_sent=True) == ready


@pytest.mark.parametrize(("key", "act"), [("kill", "long_claims"), ("zombie", "short_lease")])
async def test_a_step_in_which_nobody_can_work_any_more_says_so(tmp_path, monkeypatch, key, act) -> None:
    monkeypatch.setattr(visits, "RESTED", 0.1)
    (tmp_path / "room").mkdir()
    visit = Visit(await Room(tmp_path / "room").__aenter__())
    try:
        visit.go([step.key for step in STEPS].index(key))
        await visit.act(act)
        await until_soon(lambda: hint(visit) in ("kill", "pause"))
        for lane in visit.room.lanes.living():
            if key == "kill":
                visit.room.kill(lane.number)
            else:
                await visit.room.pause(lane.number)
        await until_soon(lambda: hint(visit) == "stranded")
        if key == "zombie":
            visit.room.go_on(visit.room.lanes.living()[0].number)
            await until_soon(lambda: hint(visit) != "stranded")
    finally:
        await visit.close()


def hint(visit: Visit) -> str:
    return str(visit.shown(known=0, claim=0)["lesson"]["hint"])


async def test_the_claim_that_is_told_to_have_been_overtaken_is_the_long_one(tmp_path) -> None:
    room = Room(tmp_path)
    for claim in (6, 7, 8):
        room.effects.sent(f"message-{claim}", claim)
        room.lanes.expect(claim, 0).turns("waiting")
        room.lanes.feed(Record(1.0, claim, "received", f"message-{claim}", claim, 1))
    for at, claim in enumerate((8, 7, 6), 2):  # 8 passes 7 by chance
        room.lanes.feed(Record(float(at), claim, "handled", f"message-{claim}", claim, 1))
    assert Facts(room, Mark()).overtaking() == (8, 6)


async def test_a_claim_goes_from_its_consumer_to_what_is_done_though_the_queue_is_read_later(tmp_path) -> None:
    room, now = Room(tmp_path), datetime.now(UTC)
    room.lanes.expect(1, 0).turns("waiting")
    row = StoredMessage("m-1", "claims.processing", State.LEASED, {"claim_id": 1}, {}, 1, 0, None, None, now, now, None)
    room.viewer.view = View(None, None, leased=[row])  # and it stays as it is
    room.effects.sent("m-1", 1)
    shown = []
    journal: tuple[What, ...] = ("received", "handled", "acked")
    for at, what in enumerate(journal):
        room.lanes.feed(Record(float(at), 1, what, "m-1", 1, 1))
        if what == "handled":
            room.effects.paid([Payment(1, "m-1", 1, 100, "1", 1)])
        stage = scene.stage(room, Mark())
        holds = stage["consumers"][0]["holds"] is not None
        shown.append([[one["claim"] for one in stage["done"]], stage["processed"], holds])
    assert shown == [[[], 0, True], [[], 0, True], [[1], 1, False]]


async def test_a_claim_that_was_paid_and_waits_again_is_not_processed(tmp_path) -> None:
    room, now = Room(tmp_path), datetime.now(UTC)
    room.lanes.expect(1, 0).turns("waiting")
    row = StoredMessage("m-1", "claims.processing", State.READY, {"claim_id": 1}, {}, 1, 0, None, None, now, now, None)
    room.viewer.view = View(None, None, ready=[row])
    room.effects.sent("m-1", 1)
    journal: tuple[What, ...] = ("received", "handled")
    for at, what in enumerate(journal):
        room.lanes.feed(Record(float(at), 1, what, "m-1", 1, 1))
    room.effects.paid([Payment(1, "m-1", 1, 100, "1", 1)])
    room.lanes.left(1, 2.0, "killed")
    stage = scene.stage(room, Mark())
    assert (stage["done"], stage["processed"]) == ([], 0)


async def test_what_is_paid_in_a_transaction_that_is_not_committed_is_not_said_to_be_paid(tmp_path) -> None:
    room = Room(tmp_path)
    room.lanes.expect(1, 0).turns("waiting")
    journal: tuple[What, ...] = ("received", "paying")
    for at, what in enumerate(journal):
        room.lanes.feed(Record(float(at), 1, what, "m-1", 1, 1))
    (consumer,) = scene.stage(room, Mark())["consumers"]
    assert (consumer["holds"]["paid"], consumer["holds"]["paying"]) == (False, True)
