"""Moving house: everything arrives, as it was, however often the move is killed."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import filao
import filao.sync
from filao.cli.move import move_command
from filao.engines import engine_for
from filao.engines.rabbitmq import control
from filao.engines.sqlite.moving import SqliteMover
from filao.moving import SLICE, Moved, move
from tests.support.servers import Postgres, Rabbitmq

pytestmark = pytest.mark.anyio

_names = count()
AT_ONCE = filao.Backoff(first=0)
MANY = 1_000
SQL_WAYS = ["sqlite sqlite", "sqlite postgresql", "postgresql sqlite", "postgresql postgresql"]


@pytest.fixture
def name() -> str:
    return f"moved{next(_names)}"


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return what gives the URL of fresh storage on an engine."""

    def give(engine: str) -> str:
        if engine == "sqlite":
            return str(tmp_path / f"{next(_names)}.db")
        if engine == "rabbitmq":
            rabbitmq: Rabbitmq = request.getfixturevalue("rabbitmq")
            return rabbitmq.url()
        postgres: Postgres = request.getfixturevalue("postgres")
        return postgres.create(f"moving{next(_names)}")

    return give


async def moved(
    source: str, target: str, *names: str, on_moved: Callable[[Moved], None] = lambda _: None
) -> list[Moved]:
    here, there = engine_for(source), engine_for(target)
    await here.open()
    await there.open()
    try:
        return await move(here, there, names, on_moved)
    finally:
        await here.close()
        await there.close()


async def everything(url: str, name: str) -> list[Any]:
    """Return all that can be seen of a queue, but for the moment at which a message became ready."""
    async with filao.connect(url) as broker:
        seen = [message for state in filao.State for message in await broker.peek(name, state=state, limit=100)]
        return [
            (
                *(message.id, message.state, message.body, message.headers, message.attempts, message.priority),
                *(message.group, message.dedup_key, message.sent_at, message.expires_at, message.reason),
                message.history,
                message.at if message.state == "dead" else None,
            )
            for message in seen
        ]


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_everything_arrives_as_it_was(place, name, way) -> None:
    source, target = map(place, way.split())
    queue = filao.Queue(name, group_dead="halt", max_attempts=3)
    async with filao.connect(source) as broker:
        await broker.declare(queue, filao.Queue("letters"))
        await broker.send_to_queue("letters", "stays")
        await broker.send_to_queue(name, "done", dedup_key="gone")
        await (await broker.receive_from_queue(name)).ack()
        await broker.send_to_queue(name, "poison", group="halted", dedup_key="dead", headers={"trace": "a"})
        await (await broker.receive_from_queue(name)).reject(ValueError("no such policy"))
        await broker.send_to_queue(name, "behind it", group="halted")
        await broker.send_to_queue(name, "retried")
        await (await broker.receive_from_queue(name)).nack(delay=500, reason="not yet")
        for body in ("first", "second"):
            await broker.send_to_queue(name, body, group="policy-12", ttl=900)
        await broker.send_to_queue(name, "later", delay=600, priority=3)
        await broker.send_to_queue(name, b"\x00raw", message_id="their-own", dedup_key="pending", priority=-1)
    before = await everything(source, name)
    (told,) = await moved(source, target, name)
    assert (told.waiting, told.dead, told.held) == (6, 1, 0)
    assert await everything(target, name) == before
    assert await everything(source, name) == []
    async with filao.connect(target) as broker:
        assert await broker.queues() == [queue]
        for key in ("gone", "dead", "pending"):
            assert (await broker.send_to_queue(name, "again", dedup_key=key)).duplicate, key
        assert (await broker.send_to_queue(name, "again", message_id="their-own")).duplicate
        assert [message.body for message in await broker.receive_many(name, 10, wait=0)] == ["first", b"\x00raw"]
        await broker.resume(name, group="halted")
        assert (await broker.receive_from_queue(name)).body == "behind it"
    async with filao.connect(source) as broker:
        assert (await broker.stats(name)).paused
        assert (await broker.receive_from_queue("letters")).body == "stays"


async def test_two_messages_with_one_key_are_both_kept(place, name) -> None:
    source, target = place("sqlite"), place("postgresql")
    for url in (source, target):
        async with filao.connect(url) as broker:
            await broker.declare(filao.Queue(name))
            await broker.send_to_queue(name, url == source, dedup_key="k")
    await moved(source, target)
    async with filao.connect(target) as broker:
        assert sorted(message.body for message in await broker.receive_many(name, 5, wait=0)) == [False, True]


async def sent_in_each_way(url: str, queue: filao.Queue) -> list[Any]:
    """Send a message without a key, and one with each kind; return what is there."""
    async with filao.connect(url) as broker:
        await broker.declare(queue)
        await broker.send_to_queue(queue, "without a key")
        await broker.send_to_queue(queue, "their id", message_id="their-own")
        await broker.send_to_queue(queue, "their key", dedup_key="k", group="policy-12")
        await broker.send_to_queue(queue, "dead", message_id="dead", dedup_key="of the dead", priority=9)
        await (await broker.receive_from_queue(queue)).reject("no such policy")
    return await everything(url, queue.name)


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_a_queue_that_is_moved_back_and_moved_again_loses_nothing(place, name, way) -> None:
    source, target = map(place, way.split())
    before = await sent_in_each_way(source, filao.Queue(name))
    for here, there in ((source, target), (target, source), (source, target)):
        await moved(here, there, name)
        assert await everything(there, name) == before
        assert await everything(here, name) == []
    async with filao.connect(target) as broker:
        assert (await broker.send_to_queue(name, "again", message_id="their-own")).duplicate
        assert (await broker.send_to_queue(name, "again", dedup_key="k")).duplicate


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_a_group_that_was_resumed_elsewhere_is_not_halted_when_it_comes_back(place, name, way) -> None:
    source, target = map(place, way.split())
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, group_dead="halt"))
        await broker.send_many(name, ["poison", "behind it"], group="policy-12")
        await (await broker.receive_from_queue(name)).reject("no such policy")
    await moved(source, target, name)
    async with filao.connect(target) as broker:
        assert await broker.receive_from_queue(name, wait=0) is None
        await broker.resume(name, group="policy-12")
    await moved(target, source, name)
    async with filao.connect(source) as broker:
        assert (await broker.receive_from_queue(name)).body == "behind it"


@pytest.mark.parametrize("way", SQL_WAYS)
@pytest.mark.parametrize("overflow", ["refuse", "drop_oldest"])
async def test_a_full_queue_is_moved_whole_with_its_dead_letters(place, name, way, overflow) -> None:
    source, target = map(place, way.split())
    queue = filao.Queue(name, max_length=3, overflow=overflow)
    async with filao.connect(source) as broker:
        await broker.declare(queue)
        await broker.send_many(queue, ["dead 1", "live 1", "dead 2"])
        for message in await broker.receive_many(queue, 3):
            await (message.release() if message.body == "live 1" else message.reject("no such policy"))
        await broker.send_many(queue, ["live 2", "live 3"])
    before = await everything(source, name)
    await moved(source, target, name)
    assert await everything(target, name) == before
    async with filao.connect(target) as broker:
        stats = await broker.stats(name)
        assert (stats.ready, stats.dead_by_reason) == (3, {"rejected": 2})
        if overflow == "refuse":
            with pytest.raises(filao.QueueFull):
                await broker.send_to_queue(name, "one more")


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_a_body_that_was_sent_under_an_earlier_limit_is_moved(place, name, way) -> None:
    source, target = map(place, way.split())
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name))
        await broker.send_many(name, ["short", "much longer", "last"])
        await broker.declare(filao.Queue(name, body_max=8))
    before = await everything(source, name)
    await moved(source, target, name)
    assert await everything(target, name) == before
    async with filao.connect(target) as broker:
        assert not (await broker.stats(name)).paused
        with pytest.raises(filao.MessageTooLarge):
            await broker.send_to_queue(name, "much longer")


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_a_move_that_was_killed_can_be_taken_back(place, name, way) -> None:
    source, target = map(place, way.split())
    before = await sent_in_each_way(source, filao.Queue(name))
    here, there = engine_for(source), engine_for(target)
    await here.open()
    await there.open()
    try:
        await there.declare(filao.Queue(name))
        async with here.mover.packing(name) as packing:  # a kill comes when they are stored, and not yet removed
            await there.mover.unpack(name, await packing.take(10))
        await move(there, here, [name])
    finally:
        await here.close()
        await there.close()
    assert await everything(source, name) == before
    assert await everything(target, name) == []


async def test_a_queue_comes_back_from_rabbitmq_with_its_ids(place, name) -> None:
    source, target = place("sqlite"), place("rabbitmq")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_to_queue(name, 1, message_id="their-own")
    await moved(source, target, name)
    await moved(target, source, name)
    async with filao.connect(source) as broker:
        assert [message.id for message in await broker.peek(name)] == ["their-own"]


@pytest.mark.parametrize("way", ["sqlite postgresql", "postgresql sqlite", "sqlite rabbitmq", "rabbitmq sqlite"])
async def test_a_move_that_is_killed_again_and_again_loses_nothing(place, name, way) -> None:
    engines = way.split()
    source, target = map(place, engines)
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_many(name, range(MANY))
    kills = 0
    while kills < 3:
        process = subprocess.Popen(_command(source, target, "--queue", name), stdout=subprocess.DEVNULL)
        if not await _more_has_arrived(target, name, process):
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    run = await asyncio.to_thread(
        subprocess.run,
        _command(source, target, "--queue", name),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert kills
    assert json.loads(run.stdout)["held"] == 0
    async with filao.connect(target) as broker:
        bodies: list[int] = []
        while message := await broker.receive_from_queue(name, wait=0.5 if len(set(bodies)) == MANY else 30):
            bodies.append(message.body)
            await message.ack()
    assert set(bodies) == set(range(MANY))
    if engines[1] == "rabbitmq":
        assert max(Counter(bodies).values()) <= 1 + kills  # it cannot tell, and says so
    else:
        assert len(bodies) == MANY
    if "rabbitmq" not in engines:
        assert bodies == sorted(bodies)


@pytest.mark.parametrize("way", ["sqlite sqlite", "sqlite rabbitmq", "postgresql rabbitmq"])
async def test_two_moves_at_once_bring_each_message_once(place, name, way) -> None:
    source, target = map(place, way.split())
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_many(name, range(MANY))
    await asyncio.gather(moved(source, target, name), moved(source, target, name))
    async with filao.connect(target) as broker:
        bodies: list[int] = []
        while message := await broker.receive_from_queue(name, wait=0.5 if len(set(bodies)) == MANY else 30):
            bodies.append(message.body)
            await message.ack()
    assert sorted(bodies) == list(range(MANY))


async def test_a_move_to_rabbitmq_begins_when_another_to_the_same_queue_is_over(place, name, monkeypatch) -> None:
    monkeypatch.setattr(control, "TAKEN_WITHIN", 0.1)
    source, target = place("sqlite"), place("rabbitmq")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_to_queue(name, 1)
        there = engine_for(target)
        await there.open()
        try:
            await there.declare(filao.Queue(name, backoff=AT_ONCE))
            async with there.mover.alone(name):
                with pytest.raises(filao.EngineUnavailable, match=f"{name}.*another program moves messages there"):
                    await moved(source, target, name)
                assert not (await broker.stats(name)).paused
        finally:
            await there.close()
        assert (await moved(source, target, name))[0].waiting == 1


async def test_a_move_to_rabbitmq_ends_when_others_are_no_longer_kept_from_it(rabbitmq, place, name) -> None:
    """It went on, and so did the next one: each message came twice."""
    source, target = place("sqlite"), place("rabbitmq")
    keeper = f"{name}{control.MOVED_TO}"

    def lose(so_far: Moved) -> None:
        if so_far.waiting == SLICE:
            owners = dict(
                line.split("\t") for line in rabbitmq.command("list_queues", "name", "owner_pid").splitlines()
            )
            rabbitmq.command("close_connection", owners[keeper], "lost")

    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_many(name, range(2 * SLICE))
    with pytest.raises(filao.EngineUnavailable, match=f"{name}.*another may have begun"):
        await moved(source, target, name, on_moved=lose)
    assert (await moved(source, target, name))[0].waiting == SLICE
    async with filao.connect(target) as broker:
        assert (await broker.stats(name)).ready == 2 * SLICE


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "filao", "move", *arguments]


async def _more_has_arrived(target: str, name: str, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the target has more than it had; False when the process has ended instead."""
    before: int | None = None
    async with asyncio.timeout(30), filao.connect(target) as broker:
        while process.poll() is None:
            try:
                stats = await broker.stats(name)
            except filao.QueueNotFound:
                before = 0
                continue
            if before is not None and stats.ready > before:
                return True
            before = stats.ready if before is None else before
    return False


async def test_to_rabbitmq_and_back(place, name) -> None:
    start, middle, end = place("sqlite"), place("rabbitmq"), place("postgresql")
    async with filao.connect(start) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE, emulate=("delay",)))
        await broker.send_to_queue(name, "dies", headers={"a": "b"})
        await (await broker.receive_from_queue(name)).reject("no such policy")
        await broker.send_to_queue(name, "retried")
        await (await broker.receive_from_queue(name)).nack(delay=0)
        await broker.send_to_queue(name, "expires", ttl=600)
        await broker.send_to_queue(name, "later", delay=0.4)
        ids = {message.body: message.id for message in await broker.peek(name)}
    (told,) = await moved(start, middle, name)
    assert (told.waiting, told.dead) == (3, 1)
    async with asyncio.timeout(20), filao.connect(middle) as broker:
        while (await broker.stats(name)).ready < 3:  # what is on the ladder cannot be moved on
            await asyncio.sleep(0.05)
    await moved(middle, end, name)
    async with filao.connect(end) as broker:
        found = {message.body: message for message in await broker.peek(name)}
        assert {body: message.id for body, message in found.items() if body != "later"} == ids
        assert found["retried"].attempts == 1
        assert found["expires"].expires_at is not None
        (dead,) = await broker.dead_letters(name)
        assert (dead.body, dead.reason, dead.error, dead.headers) == ("dies", "rejected", "no such policy", {"a": "b"})
        assert await broker.redrive(name) == 1
        assert {message.body for message in await broker.receive_many(name, 9, wait=0)} == {*found, "dies"}


async def test_a_queue_is_not_moved_onto_itself_by_another_spelling(place, name, tmp_path) -> None:
    postgres: str = place("postgresql")
    for url, other in (
        (str(tmp_path / "claims.db"), f"sqlite:///{tmp_path}/../{tmp_path.name}/claims.db"),
        (postgres, postgres.replace("127.0.0.1", "localhost")),
        (place("rabbitmq"), place("rabbitmq").replace("127.0.0.1", "localhost")),
    ):
        assert url != other
        async with filao.connect(url) as broker:
            await broker.declare(filao.Queue(name, backoff=AT_ONCE))
            await broker.send_to_queue(name, 1, message_id="own")
        with pytest.raises(filao.ConfigurationError, match="the same storage"):
            await moved(url, other, name)
        async with filao.connect(url) as broker:
            assert (await broker.receive_from_queue(name)).body == 1


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
async def test_what_a_dead_consumer_held_is_moved_when_its_lease_is_over(place, name, engine) -> None:
    source, target = place(engine), place("sqlite")
    holder = "import sys, os, filao.sync\nwith filao.sync.connect(sys.argv[1]) as b:\n"
    holder += "    b.receive_from_queue(sys.argv[2], lease=0.2); os._exit(9)"
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name))
        await broker.send_many(name, range(3))
        command = [sys.executable, "-c", holder, source, name]
        await asyncio.to_thread(subprocess.run, command, check=False)
        async with asyncio.timeout(10):
            while not (await broker.peek(name, state="leased"))[0].at.timestamp() < time.time():
                await asyncio.sleep(0.01)
    (told,) = await moved(source, target, name)
    assert (told.waiting, told.held) == (3, 0)
    async with filao.connect(target) as broker:
        assert [message.body for message in await broker.peek(name)] == [0, 1, 2]


async def test_what_waits_on_the_ladder_is_said_to_stay(place, name) -> None:
    source, target = place("rabbitmq"), place("sqlite")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, emulate=("delay",)))
        await broker.send_to_queue(name, "now")
        await broker.send_to_queue(name, "later", delay=3600)
    command = _command(source, target, "--queue", name)
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["waiting"] == 1
    assert json.loads(done.stdout)["held"] >= 1
    assert done.returncode == 1
    assert "left at amqp://guest:…@" in done.stderr  # whose password is nobody's business


@pytest.mark.parametrize("way", SQL_WAYS)
async def test_a_queue_that_the_target_knows_keeps_its_rules_there(place, name, way) -> None:
    source, target = map(place, way.split())
    known = filao.Queue(name, lease=7, max_attempts=2)
    async with filao.connect(source) as here, filao.connect(target) as there:
        await here.declare(filao.Queue(name))
        await here.send_to_queue(name, 1)
        await there.declare(known)
        await moved(source, target, name)
        assert await there.queues() == [known]
        assert (await there.receive_from_queue(name)).body == 1


async def test_both_queues_are_paused_while_messages_are_moved(place, name) -> None:
    source, target = place("sqlite"), place("sqlite")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name))
        await broker.send_to_queue(name, 1)
    here, there = engine_for(source), engine_for(target)
    await here.open()
    await there.open()
    paused = []

    def look(so_far: Moved) -> None:
        for path in (source, target):
            with closing(sqlite3.connect(path)) as file:
                paused.append((so_far.waiting, *file.execute("SELECT paused FROM filao_queue").fetchone()))

    try:
        await move(here, there, [name], look)
    finally:
        await here.close()
        await there.close()
    assert paused == [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (1, 0)]  # before, during and after it


async def test_what_the_target_cannot_keep_stays(place, name) -> None:
    source, target = place("sqlite"), place("rabbitmq")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, max_length=100))
        await broker.send_to_queue(name, 1, group="g")
    with pytest.raises(filao.UnsupportedFeature, match="max_length"):
        await moved(source, target, name)
    async with filao.connect(target) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
    with pytest.raises(filao.UnsupportedFeature, match="group='g'"):
        await moved(source, target, name)
    async with filao.connect(source) as broker:
        await broker.resume(name)
        assert (await broker.receive_from_queue(name)).body == 1


async def test_a_header_that_the_target_acts_upon_stops_a_move_before_it_begins(place, name) -> None:
    source, target = place("sqlite"), place("rabbitmq")
    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name, backoff=AT_ONCE))
        await broker.send_many(name, range(filao.moving.SLICE))
        await broker.send_to_queue(name, 1, headers={"CC": "x"})
        with pytest.raises(filao.MessageNotEncodable, match="'CC'"):
            await moved(source, target, name)
        assert (await broker.stats(name)).ready == filao.moving.SLICE + 1


async def test_the_command_says_what_it_would_do_and_does_it(place, name) -> None:
    source, target = place("sqlite"), place("sqlite")

    def run(*arguments: str) -> Any:
        environment = {key: value for key, value in os.environ.items() if key != "FILAO_URL"}
        return subprocess.run(
            _command(*arguments), capture_output=True, text=True, timeout=60, check=False, env=environment
        )

    async with filao.connect(source) as broker:
        await broker.declare(filao.Queue(name))
        await broker.send_many(name, range(5))
        held = await broker.receive_from_queue(name)
        dry = await asyncio.to_thread(run, source, target, "--dry-run")
        assert json.loads(dry.stdout) == {"queue": name, "waiting": 4, "dead": 0, "keys": 0, "held": 1}
        assert (dry.returncode, (await broker.stats(name)).ready, Path(target).exists()) == (1, 4, False)
        done = await asyncio.to_thread(run, source, target)
        assert (done.returncode, json.loads(done.stdout)["waiting"]) == (1, 4)
        assert "1 message left at" in done.stderr
        await held.release()
        done = await asyncio.to_thread(run, source, target)
        assert (done.returncode, json.loads(done.stdout)["waiting"]) == (0, 1)
    async with filao.connect(target) as broker:
        assert (await broker.stats(name)).ready == 5
    for arguments, text in (
        ((source, source), "the same storage"),
        ((source, target, "--queue", "clams"), f"'{name}'"),
        ((source, "redis://x/"), "no URL that Filao knows"),
    ):
        refused = await asyncio.to_thread(run, *arguments)
        assert refused.returncode == 3
        assert text in refused.stderr


def test_a_move_that_fails_half_way_says_what_is_left_paused(tmp_path, monkeypatch, capfd) -> None:
    source, target = tmp_path / "source.db", tmp_path / "a target.db"
    with filao.sync.connect(source) as broker:
        for name in ("claims", "empty"):
            broker.declare(filao.Queue(name))
        broker.send_many("claims", [1])
    for error in (filao.EngineError("it broke"), SystemExit(143)):

        def fail(*_: object, error: BaseException = error) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(SqliteMover, "unpack", fail)
            with pytest.raises(type(error)):
                move_command.main([str(source), str(target)], standalone_mode=False)
        said = capfd.readouterr().err
        assert said.count("filao:") == 1
        assert f"queue 'claims' may be left paused at {source} and {target}: move again" in said
        assert f"filao resume {source} claims; filao resume '{target}' claims" in said
    assert move_command.main([str(source), str(target)], standalone_mode=False) == 0
    assert "paused" not in capfd.readouterr().err
