"""The rules of a queue: what is refused, what is stored, what follows from them."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filao import Backoff, ConfigurationError, Queue
from filao.queue import not_found, retry_delay, rules_from_json, rules_to_json


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        *(("lease", value) for value in (0, -1, math.nan, math.inf, "30", None, True, 8 * 86_400)),
        *(("max_attempts", value) for value in (0, -1, 1.5, "5", None, True)),
        *(("max_length", value) for value in (0, -1, 1.5, True)),
        *(("body_max", value) for value in (0, 2**40, None)),
        *(("ttl", value) for value in (0, -1, "1")),
        *(("dedup_window", value) for value in (-1, None)),
        *(("overflow", value) for value in ("drop", None)),
        *(("on_expiry", value) for value in ("keep", None)),
        *(("group_failure", value) for value in ("halt", None)),
        *(("group_dead", value) for value in ("stop", None)),
        ("backoff", 5),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_by_name(rule: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"queue 'claims'.*{rule}"):
        Queue("claims", **{rule: value})


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 129, "a/b", None, 7])
def test_a_name_that_no_engine_could_carry_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="queue name"):
        Queue(name)


@pytest.mark.parametrize("terms", [{"first": -1}, {"factor": 0.5}, {"ceiling": math.inf}, {"jitter": 1.1}])
def test_a_backoff_that_makes_no_sense_is_refused(terms: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="Backoff"):
        Backoff(**terms)


def test_rules_survive_being_stored() -> None:
    queue: Queue = Queue(
        "q", lease=1.5, max_attempts=2, ttl=9, backoff=Backoff(first=3), max_length=7, group_dead="halt"
    )
    assert rules_from_json("q", rules_to_json(queue)) == queue


def test_a_rule_of_a_newer_version_is_passed_over() -> None:
    assert rules_from_json("q", '{"lease": 5.0, "unheard_of": 1}') == Queue("q", lease=5.0)


@given(attempt=st.integers(1, 10_000), chance=st.floats(0, 1))
def test_a_backoff_stays_between_its_jitter_and_its_ceiling(attempt: int, chance: float) -> None:
    backoff = Backoff(first=1, factor=3, ceiling=100, jitter=0.5)
    whole = min(100.0, 3.0 ** min(attempt - 1, 10))
    assert whole * 0.5 <= backoff.delay(attempt, chance) <= whole


def test_the_last_attempt_is_followed_by_death() -> None:
    queue: Queue = Queue("q", max_attempts=3, backoff=Backoff(first=2, jitter=0))
    assert [retry_delay(queue, attempt, 0.0) for attempt in (1, 2, 3, 4)] == [2, 4, None, None]


def test_a_queue_that_is_not_found_names_its_neighbours() -> None:
    assert "'claims.processing'" in str(not_found("claim.procesing", ["documents", "claims.processing"]))
    assert "No queue is declared" in str(not_found("claims", []))


def test_a_queue_that_was_deleted_since_it_was_known_is_no_neighbour_of_itself() -> None:
    assert "'claims.dead'" in str(not_found("claims", ["claims", "claims.dead"]))
    assert "Did you mean 'claims'" not in str(not_found("claims", ["claims", "claims.dead"]))


@dataclass
class Changeable:
    claim: int


@pytest.mark.parametrize("body", [dict, list, Changeable, dict[str, int], Any, Changeable | None])
def test_a_type_may_be_one_whose_instances_cannot_be_hashed(body: Any) -> None:
    assert Queue("claims", body=body).body == body


def test_a_queue_is_made_by_its_generic_form_too() -> None:
    assert Queue[int]("claims", int) == Queue("claims", int)
