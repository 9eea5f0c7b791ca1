"""Hypothesis drives an engine and the model of `model.py` in step: whatever one says, the other must say.

Long random histories of sends, receives, settles, failures and leaps of time, over every rule that a queue can have.
"""

import time
from itertools import count
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

import filao
import filao.sync
from filao.conformance.stage import SOON, add_up
from filao.testing import Clock
from tests.support.model import Model, QuorumModel, Terms

RULES = st.fixed_dictionaries(
    {
        "lease": st.sampled_from([1.0, 5.0]),
        "max_attempts": st.integers(1, 3),
        "backoff": st.sampled_from([filao.Backoff(first=0, jitter=0), filao.Backoff(first=2, jitter=0)]),
        "on_expiry": st.sampled_from(["dead", "drop"]),
        "dedup_window": st.sampled_from([0.0, 3.0]),
        "max_length": st.sampled_from([None, 3]),
        "group_failure": st.sampled_from(["block", "skip"]),
        "group_dead": st.sampled_from(["continue", "halt"]),
    }
)
DEDUP_KEYS = st.sampled_from([None, None, "k", "l"])
MESSAGE_IDS = st.sampled_from([None, None, "m", "n"])
SETTLEMENTS = st.sampled_from(["ack", "ack", "nack", "reject", "release"])


_queues = count()


class QueueMachine(RuleBasedStateMachine):
    """One queue with random rules, and its model."""

    deliveries: Bundle[Any] = Bundle("deliveries")
    numbers: Bundle[int] = Bundle("numbers")
    url = "sqlite://:memory:"
    count_rows = "SELECT state, count(*) FROM filao_message GROUP BY state"
    states: tuple[Any, ...] = (2, 3, 4, 5, 6)

    @initialize(rules=RULES)
    def declare(self, rules: dict[str, Any]) -> None:
        self.clock = Clock()
        self.broker = filao.sync.connect(self.url, clock=self.clock)
        self.broker.open()
        self.queue = f"claims-{next(_queues)}"
        queue = filao.Queue(self.queue, **rules)
        self.broker.declare(queue)
        self.model = Model(queue, round(self.clock() * 1000))
        self.bodies = 0
        self.numbered: dict[str, int] = {}
        """The model's number of each message, by the engine's id."""

    @rule(
        target=numbers,
        keys=st.lists(st.tuples(DEDUP_KEYS, MESSAGE_IDS), min_size=1, max_size=4),
        priority=st.integers(-1, 1),
        group=st.sampled_from([None, "a", "a", "b"]),
        delay=st.sampled_from([0.0, 0.0, 2.0]),
        ttl=st.sampled_from([None, None, 4.0]),
    )
    def send(self, keys: list[Any], priority: int, group: str | None, delay: float, ttl: float | None):
        bodies = [self.bodies + place for place in range(1, len(keys) + 1)]
        self.bodies += len(keys)
        before = self.model.last
        terms = Terms(priority, group, round(delay * 1000), None if ttl is None else round(ttl * 1000))
        numbers = self.model.send(bodies, keys, terms)
        said: dict[str, Any] = {"delay": delay, "priority": priority, "group": group, "ttl": ttl}
        sends = [
            filao.Outgoing(body, dedup_key=dedup_key, message_id=message_id, **said)
            for body, (dedup_key, message_id) in zip(bodies, keys, strict=True)
        ]
        try:
            receipts = self.broker.send_many(self.queue, sends)
        except filao.QueueFull:
            assert numbers is None
            return multiple()
        assert numbers is not None
        new = before
        for receipt, number in zip(receipts, numbers, strict=True):
            assert receipt.duplicate == (number <= new)
            new = max(new, number)
            if not receipt.duplicate:
                self.numbered[receipt.id] = number  # an id may come again once it is forgotten
            assert self.numbered[receipt.id] == number
        return multiple(*numbers)

    @rule(target=deliveries, limit=st.integers(1, 4))
    def receive(self, limit: int):
        received = self.model.receive(limit)
        messages = self.broker.receive_many(self.queue, limit, wait=0)
        assert [self.numbered[message.id] for message in messages] == [number for number, _ in received]
        for message in messages:
            held = self.model.messages[self.numbered[message.id]]
            assert (message.body, message.attempt, message.group) == (held.body, held.attempts, held.group)
        return multiple(
            *((message, number, lease) for message, (number, lease) in zip(messages, received, strict=True))
        )

    @rule(delivery=deliveries, how=SETTLEMENTS, delay=st.sampled_from([0.0, 0.0, 2.0]))
    def settle(self, delivery: Any, how: Any, delay: float) -> None:
        message, number, lease = delivery
        if message.settled:
            return
        accepted = self.model.settle(number, lease, how, round(delay * 1000))
        try:
            if how == "release":
                message.release(delay=delay)
            else:
                getattr(message, how)()
        except filao.LeaseLost:
            assert not accepted
        else:
            assert accepted

    @rule(delivery=deliveries, seconds=st.sampled_from([1.0, 8.0]))
    def extend(self, delivery: Any, seconds: float) -> None:
        message, number, lease = delivery
        held = self.model.messages.get(number)
        if message.settled or (held is not None and held.state != "leased"):
            return  # extending what ran out and was seen to is a check of its own
        accepted = self.model.extend(number, lease, round(seconds * 1000))
        try:
            message.extend(seconds)
        except filao.LeaseLost:
            assert not accepted
        else:
            assert accepted

    @rule(seconds=st.sampled_from([0.001, 1.0, 2.0, 6.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now = round(self.clock() * 1000)

    @rule(limit=st.integers(1, 3))
    def redrive(self, limit: int) -> None:
        assert self.broker.redrive(self.queue, limit=limit) == self.model.redrive(limit)

    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        name = next((name for name, one in self.numbered.items() if one == number), None)
        if name is None:
            return  # another message has its id by now
        assert self.broker.cancel(self.queue, name) == self.model.cancel(number)

    @rule()
    def purge(self) -> None:
        assert self.broker.purge(self.queue) == self.model.purge()

    @rule(group=st.sampled_from(["a", "b"]))
    def resume(self, group: str) -> None:
        self.broker.resume(self.queue, group=group)
        self.model.halted.discard(group)

    @invariant()
    def both_count_the_same(self) -> None:
        self.model.let_expire()
        stats = self.broker.stats(self.queue)
        add_up(stats)
        assert stats.ready + stats.delayed + stats.blocked == self.model.count("pending")
        assert (stats.leased, stats.dead) == (self.model.count("leased"), self.model.count("dead"))

    @invariant()
    def the_dead_letters_are_the_same(self) -> None:
        dead = [(self.numbered[letter.id], letter.reason) for letter in self.broker.dead_letters(self.queue)]
        assert dead == [(held.number, held.reason) for held in self.model._in("dead")]

    @invariant()
    def the_counters_are_what_the_rows_say(self) -> None:
        stats = self.broker.stats(self.queue)
        with self.broker.transaction() as transaction:
            rows = dict(transaction.execute(self.count_rows.replace("{queue}", self.queue)))
        counted = (stats.ready, stats.delayed, stats.leased, stats.blocked, stats.dead)
        assert counted == tuple(rows.get(state, 0) for state in self.states)

    def teardown(self) -> None:
        if hasattr(self, "broker"):
            self.broker.close()


class QuorumMachine(RuleBasedStateMachine):
    """One queue on RabbitMQ, and its model: the rules that it has, in real time."""

    deliveries: Bundle[Any] = Bundle("deliveries")
    url = ""

    @initialize(max_attempts=st.integers(1, 3))
    def declare(self, max_attempts: int) -> None:
        self.broker = filao.sync.connect(self.url)
        self.broker.open()
        self.queue = filao.Queue(f"machine-{next(_queues)}", max_attempts=max_attempts, backoff=filao.Backoff(first=0))
        self.broker.declare(self.queue)
        self.model = QuorumModel(max_attempts)
        self.bodies = 0

    @rule(count=st.integers(1, 3))
    def send(self, count: int) -> None:
        for _ in range(count):
            self.bodies += 1
            self.broker.send_to_queue(self.queue, self.bodies)
            self.model.send(self.bodies)

    @rule(target=deliveries, limit=st.integers(1, 4))
    def receive(self, limit: int):
        wanted = self.model.receive(limit)
        messages = self.broker.receive_many(self.queue, limit, wait=0)
        assert [(message.body, message.attempt) for message in messages] == wanted
        return multiple(*messages)

    @rule(delivery=deliveries, how=SETTLEMENTS)
    def settle(self, delivery: Any, how: Any) -> None:
        if not delivery.settled:
            self.model.settle(delivery.body, how)
            getattr(delivery, how)()

    @rule(limit=st.integers(2, 4))
    def give_up(self, limit: int) -> None:
        wanted = self.model.receive(limit)
        messages = self.broker.receive_many(self.queue, limit, wait=0)
        assert [(message.body, message.attempt) for message in messages] == wanted
        for message in messages:
            self.model.settle(message.body, "reject")
            message.reject()

    @rule(delivery=deliveries)
    def extend(self, delivery: Any) -> None:
        if not delivery.settled:
            delivery.extend(5)

    @rule(limit=st.integers(1, 3))
    def redrive(self, limit: int) -> None:
        assert self.broker.redrive(self.queue, limit=limit) == self.model.redrive(limit)

    @rule()
    def purge(self) -> None:
        assert self.broker.purge(self.queue) == self.model.purge()

    @invariant()
    def both_count_the_same(self) -> None:
        wanted = (self.model.waiting, len(self.model.held), len(self.model.dead))
        until = time.monotonic() + SOON  # the server counts a moment later
        while (found := self._counted()) != wanted and time.monotonic() < until:
            time.sleep(0.005)
        assert found == wanted

    def _counted(self) -> tuple[int, int, int]:
        stats = self.broker.stats(self.queue)
        return stats.ready, stats.leased, stats.dead

    @invariant()
    def the_dead_letters_are_the_same(self) -> None:
        dead = [(letter.body, letter.reason) for letter in self.broker.dead_letters(self.queue)]
        assert dead == list(self.model.dead)

    def teardown(self) -> None:
        if hasattr(self, "broker"):
            self.broker.delete_queue(self.queue, messages=True)
            self.broker.close()


settings.register_profile("default", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("default")


def test_sqlite_does_what_the_model_does() -> None:
    run_state_machine_as_test(QueueMachine, settings=settings(max_examples=150, stateful_step_count=40))


def test_postgresql_does_what_the_model_does(postgres) -> None:
    class OnPostgresql(QueueMachine):
        url = postgres.url("filao")
        states = ("ready", "delayed", "leased", "blocked", "dead")
        count_rows = """
            SELECT m.state::text, count(*) FROM filao.message m JOIN filao.queue q ON q.id = m.queue
            WHERE q.name = '{queue}' GROUP BY 1
        """

    # each takes a second and a half; every run tries others, and SQLite, of the same model, ten times as many
    run_state_machine_as_test(OnPostgresql, settings=settings(max_examples=15, stateful_step_count=40))


def test_rabbitmq_does_what_its_model_does(rabbitmq) -> None:
    class OnRabbitmq(QuorumMachine):
        url = rabbitmq.url()

    run_state_machine_as_test(OnRabbitmq, settings=settings(max_examples=12, stateful_step_count=30))
