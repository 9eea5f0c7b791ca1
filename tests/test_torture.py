"""A short run of the kill test, and proof that its checker goes red: on forged histories, one broken promise in
each.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.auditor import complaints_of
from tests.torture.checker import Kept, Left, check
from tests.torture.history import History, Record, read
from tests.torture.scene import Pen, Scene

ROOT = Path(__file__).parent.parent
LEASE = 1.0

KEPT = ("ready", "delayed", "blocked", "leased", "dead", "acked", "dropped", "purged", "cancelled")
COUNTERS = dict.fromkeys((*KEPT, "sent", "duplicates", "received", "nacked", "released"), 0)


def test_nothing_is_lost_or_unexplained_when_processes_are_killed_at_random(url) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.torture",
        "--minutes",
        "0.1",
        "--pause",
        "0.15",
        "--seed",
        "1",
        "--url",
        url,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_two_pens_of_a_process_write_as_the_same_task(tmp_path: Path) -> None:
    desk = Pen(Scene("", tmp_path, "worker-1"), History(tmp_path / "worker-1"))
    pens = [desk, first := desk.another(), second := first.another(), desk.another(), second.another(), first.another()]
    assert len({pen.task for pen in pens}) == len(pens)


# --- forgeries -------------------------------------------------------------------------------------------------------


class Forger:
    """Writes a history that never happened; `at` is when a call ended, and each takes 10 ms."""

    def __init__(self) -> None:
        self.history: list[Record] = []
        self._tasks = 0

    def call(self, verb, at, *ends, process="consumer.0", **about):
        self._tasks += 1
        begin = Record(process=process, task=self._tasks, call=verb, began=at - 0.01, **about)
        self.history.append(begin)
        for end in ends:
            fields = {name: getattr(begin, name) for name in Record.__struct_fields__}
            self.history.append(Record(**{**fields, "outcome": "done", "ended": at, **end}))

    def sent(self, message, at=0.0, outcome="done", **about):
        meant = {"key": message, "place": (0, len(self.history)), **about}
        self.call("send", at, {"id": message, "outcome": outcome}, process="producer.0", **meant)

    def received(self, message, at, *, attempt=1, token=0, process="consumer.0", **about):
        found = {"id": message, "key": message, "attempt": attempt, "token": token or attempt, **about}
        self.call("receive", at, found, process=process, limit=1, seconds=LEASE)

    def settled(self, verb, message, at, outcome="done", *, attempt=1, token=0, **about):
        lease = {"id": message, "attempt": attempt, "token": token or attempt}
        self.call(verb, at, {"outcome": outcome}, **lease, **about)

    def cut_off(self, verb, at, **about):
        self.call(verb, at, **about)

    def killed(self, process, at):
        self.history.append(Record(process=process, call="live", outcome="killed", began=at, ended=at + 0.01))


@pytest.fixture
def forger() -> Forger:
    """Begin a history in which message "a" is sent, received and acked."""
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.settled("ack", "a", 1.1)
    return forger


KEEPS: dict[str, Kept] = {"letters": "while allowed", "bills": "until received"}


def verdict(forger: Forger, left: Left | None = None) -> str:
    return "\n".join(check(forger.history, left or Left(), KEEPS))


def test_the_checker_accepts_a_history_in_which_all_is_well(forger) -> None:
    assert verdict(forger) == ""


def test_the_checker_sees_a_lost_message(forger) -> None:
    forger.sent("b")
    assert "lost message b" in verdict(forger)


def test_the_checker_sees_a_message_lost_after_its_delivery(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0, process="consumer.1")
    forger.killed("consumer.1", 1.1)
    assert "lost message b" in verdict(forger)


def test_the_checker_counts_a_refused_ack_as_no_ack(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0)
    forger.settled("ack", "b", 2.5, "lease_lost")
    assert "lost message b" in verdict(forger)


def test_the_checker_accepts_dead_letters_and_acks_that_were_cut_off(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0, token=2)
    forger.settled("reject", "b", 1.1, token=2)
    forger.sent("c")
    forger.received("c", 1.0, process="consumer.1", token=3)
    forger.cut_off("ack", 1.1, process="consumer.1", id="c", attempt=1, token=3)
    forger.killed("consumer.1", 1.2)
    assert verdict(forger, Left(dead={"b": 1})) == ""


def test_the_checker_sees_a_message_that_nobody_sent(forger) -> None:
    forger.received("b", 1.0)
    forger.settled("ack", "b", 1.1)
    assert "b was never sent" in verdict(forger)


def test_the_checker_sees_a_send_that_was_stored_twice(forger) -> None:
    forger.sent("b", key="a")
    forger.received("b", 1.0, key="a")
    forger.settled("ack", "b", 1.1)
    assert "a was stored twice" in verdict(forger)


def test_the_checker_sees_a_duplicate_that_deduplication_let_through(forger) -> None:
    for message in "bc":
        forger.sent(message, dedup_key="once")
        forger.received(message, 1.0)
        forger.settled("ack", message, 1.1)
    assert "dedup_key once was stored as b, c" in verdict(forger)


def test_the_checker_accepts_a_duplicate_that_deduplication_recognised(forger) -> None:
    forger.sent("b", dedup_key="once")
    forger.sent("b", 0.5, "duplicate", key="c", dedup_key="once")
    forger.received("b", 1.0)
    forger.settled("ack", "b", 1.1)
    assert verdict(forger) == ""


def test_the_checker_sees_an_acked_message_come_back(forger) -> None:
    forger.received("a", 5.0, attempt=2)
    forger.settled("ack", "a", 5.1, "lease_lost", attempt=2)
    assert "a was acked, and then attempt 2 was delivered" in verdict(forger)


def test_the_checker_sees_a_second_ack(forger) -> None:
    forger.received("a", 1.05, attempt=2)
    forger.settled("ack", "a", 1.2, attempt=2)
    assert "a was acked twice" in verdict(forger)


def test_the_checker_sees_an_unexplained_duplicate() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.received("a", 1.5, attempt=2)
    forger.settled("ack", "a", 1.6, attempt=2)
    assert "unexplained duplicate: message a was delivered again as attempt 2" in verdict(forger)


@pytest.mark.parametrize("cause", ["killed", "nacked", "released", "lease over", "extended and lease over"])
def test_the_checker_accepts_an_explained_duplicate(cause) -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0, process="consumer.1", token=1)
    again, attempt = 1.5, 2
    match cause:
        case "killed":
            forger.killed("consumer.1", 1.2)
        case "nacked":
            forger.settled("nack", "a", 1.2)
        case "released":
            forger.settled("release", "a", 1.2)
            attempt = 1
        case "lease over":
            again = 2.0
        case "extended and lease over":
            forger.settled("extend", "a", 1.8, seconds=LEASE, process="consumer.1")
            again = 2.9
    forger.received("a", again, attempt=attempt, token=2)
    forger.settled("ack", "a", again + 0.1, attempt=attempt, token=2)
    assert verdict(forger) == ""


def test_the_checker_sees_two_live_leases_at_once() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0, process="consumer.1")
    forger.received("a", 1.5, process="consumer.2", attempt=2)
    forger.settled("ack", "a", 1.6, attempt=2)
    assert "message a: two live leases at once" in verdict(forger)


def test_the_checker_sees_two_live_leases_because_one_was_extended() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.settled("extend", "a", 1.8, seconds=LEASE)
    forger.received("a", 2.1, attempt=2)
    forger.settled("ack", "a", 2.2, attempt=2)
    assert "message a: two live leases at once" in verdict(forger)


def test_the_checker_sees_a_stale_token_accepted() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.received("a", 2.5, attempt=2)
    forger.settled("ack", "a", 2.7)
    assert "a stale ack of attempt 1 was accepted" in verdict(forger)


def test_the_checker_sees_a_live_lease_refused_to_its_holder(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0)
    forger.settled("ack", "b", 1.5, "lease_lost")
    assert "its holder's ack was refused while its lease ran" in verdict(forger)


def test_the_checker_sees_two_leases_in_one_group() -> None:
    forger = Forger()
    for message in "ab":
        forger.sent(message, group="policy-12")
    for message in "ab":
        forger.received(message, 1.0, group="policy-12")
    for message in "ab":
        forger.settled("ack", message, 1.5)
    assert "group policy-12: two live leases at once" in verdict(forger)


def test_the_checker_sees_a_group_out_of_order() -> None:
    forger = Forger()
    for message in "ab":
        forger.sent(message, group="policy-12")
    for message, at in (("b", 1.0), ("a", 2.0)):
        forger.received(message, at, group="policy-12")
        forger.settled("ack", message, at + 0.1)
    assert "group order of policy-12 broken: message b" in verdict(forger)


def test_the_checker_accepts_a_group_that_goes_on_after_a_dead_letter() -> None:
    forger = Forger()
    for message in "ab":
        forger.sent(message, group="policy-12")
    forger.received("a", 1.0, group="policy-12")
    forger.settled("reject", "a", 1.1)
    forger.received("b", 1.2, group="policy-12")
    forger.settled("ack", "b", 1.3)
    assert verdict(forger, Left(dead={"a": 1})) == ""


def test_the_checker_sees_an_attempt_counted_twice() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.settled("nack", "a", 1.1)
    forger.received("a", 1.2, token=2)
    forger.settled("ack", "a", 1.3, token=2)
    assert "attempts of message a don't add up" in verdict(forger)


def test_the_checker_sees_an_attempt_that_nobody_made() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0, attempt=2)
    forger.settled("ack", "a", 1.1, attempt=2)
    assert "1 deliveries were seen by nobody, but kills can have hidden 0" in verdict(forger)


def test_the_checker_sees_an_attempt_used_up_by_a_release() -> None:
    forger = Forger()
    forger.sent("a")
    forger.received("a", 1.0)
    forger.settled("release", "a", 1.1)
    forger.received("a", 1.2, attempt=2)
    forger.settled("ack", "a", 1.3, attempt=2)
    assert "1 deliveries were seen by nobody" in verdict(forger)


def test_the_checker_accepts_an_attempt_that_a_kill_hid() -> None:
    forger = Forger()
    forger.sent("a")
    forger.cut_off("receive", 0.9, process="consumer.1", limit=1, seconds=LEASE)
    forger.killed("consumer.1", 0.95)
    forger.received("a", 1.0, attempt=2)
    forger.settled("ack", "a", 1.1, attempt=2)
    assert verdict(forger) == ""


def test_the_checker_sees_dead_letters_whose_attempts_are_wrong(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0)
    forger.settled("reject", "b", 1.1)
    assert "1 deliveries were seen by nobody" in verdict(forger, Left(dead={"b": 2}))


def test_the_checker_accepts_a_dead_letter_that_the_operator_sent_back_and_no_other_that_returns(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0)
    forger.settled("reject", "b", 1.1)
    forger.received("b", 1.5, token=2, epoch=1)
    forger.settled("ack", "b", 1.6, token=2, epoch=1)
    assert "unexplained duplicate: message b" in verdict(forger)
    forger.call("redrive", 1.3, {"count": 1}, process="operator.0", id="b")
    assert verdict(forger) == ""


def test_the_checker_sees_messages_missing_that_nobody_deleted(forger) -> None:
    forger.sent("b", queue="letters")
    forger.sent("c", queue="letters")
    forger.call("purge", 1.0, {"count": 1}, process="operator.0", queue="letters", limit=1_000)
    assert "lost messages of letters: 2 are missing, and 1 at most were deleted" in verdict(forger)
    forger.call("cancel", 1.1, {"count": 1}, process="operator.0", queue="letters", limit=1)
    assert verdict(forger) == ""


def test_the_checker_sees_what_is_received_twice_or_by_nobody_at_most_once(forger) -> None:
    forger.sent("b", queue="bills")
    assert "lost messages of bills: nobody received 1" in verdict(forger)
    forger.received("b", 1.0, queue="bills")
    assert verdict(forger) == ""
    forger.received("b", 3.0, queue="bills", attempt=2)
    assert "message b was received twice" in verdict(forger)


@pytest.mark.parametrize("outcome", ["undone", "refused"])
def test_the_checker_sees_a_message_whose_send_was_taken_back(forger, outcome) -> None:
    forger.sent("", outcome=outcome, key="b")
    assert verdict(forger) == ""
    forger.received("b", 1.0)
    forger.settled("ack", "b", 1.1)
    assert f"the send of b was {outcome}, and the message is there" in verdict(forger)


def test_the_checker_sees_a_delivery_before_its_delay_after_its_ttl_or_in_a_pause(forger) -> None:
    for message, about in (("b", {"delay": 2.0}), ("c", {"ttl": 0.5}), ("d", {})):
        forger.sent(message, **about)
        forger.received(message, 1.0)
        forger.settled("ack", message, 1.1)
    forger.call("pause", 0.9, {}, process="operator.0")
    forger.call("resume", 1.2, {}, process="operator.0")
    found = verdict(forger)
    assert "message b was delivered before its delay was over" in found
    assert "message c was delivered after its time to live" in found
    assert "message d was delivered while its queue was paused" in found


def test_the_checker_sees_a_message_id_that_was_stored_twice(forger) -> None:
    for _ in range(2):
        forger.sent("b", message_id="b")
    forger.received("b", 1.0)
    forger.settled("ack", "b", 1.1)
    assert "message_id b was stored 2 times" in verdict(forger)


def test_the_checker_accepts_what_a_process_that_was_told_to_end_gave_back(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0, process="consumer.1")
    forger.received("b", 1.5, token=2)
    forger.settled("ack", "b", 1.6, token=2)
    assert "unexplained duplicate" in verdict(forger)
    forger.history.append(Record(process="consumer.1", call="live", outcome="ended", began=1.2, ended=1.3))
    assert verdict(forger) == ""


def test_the_checker_passes_on_what_an_audit_found(forger) -> None:
    forger.call("audit", 1.0, {"text": ""}, process="auditor.0")
    assert verdict(forger) == ""
    forger.call("audit", 2.0, {"text": "claims: 3 ready by the counters, 4 there"}, process="auditor.0")
    assert "audit: claims: 3 ready by the counters, 4 there" in verdict(forger)


@pytest.mark.parametrize(
    ("counted", "rows", "strays", "found"),
    [
        ({"ready": 1, "sent": 1}, [("claims", "ready", 1)], 0, ""),
        ({"ready": 2, "sent": 2}, [("claims", "ready", 1)], 0, "claims: 2 ready by the counters, 1 there"),
        ({"sent": 1}, [], 0, "claims: the counters don't add up"),
        ({}, [(None, "ready", 1)], 0, "1 messages are of no queue"),
        ({}, [], 3, "3 failures are of no message"),
    ],
)
def test_an_audit_compares_the_counters_with_what_is_there(counted, rows, strays, found) -> None:
    complaints = "; ".join(complaints_of({"claims": counted}, rows, strays))
    assert found in complaints
    assert bool(found) == bool(complaints)


def test_an_audit_sees_a_queue_that_is_too_long() -> None:
    (complaint,) = complaints_of({"bills": {"leased": 21, "sent": 21}}, [("bills", "leased", 21)], 0)
    assert complaint == "bills: 21 wait or are leased, of 20 allowed"


def test_the_checker_sees_effects_that_are_missing_or_there_twice(forger) -> None:
    forger.sent("b")
    forger.received("b", 1.0, token=2)
    forger.settled("commit", "b", 1.1, token=2)
    assert verdict(forger, Left(effects=["b"])) == ""
    assert "b took effect 2 times" in verdict(forger, Left(effects=["b", "b"]))
    assert "its effect is missing" in verdict(forger)
    assert "b took effect, but" not in verdict(forger)
    assert "a took effect, but no commit" in verdict(forger, Left(effects=["a", "b"]))


def test_the_checker_sees_counters_that_lie(forger) -> None:
    right = {**COUNTERS, "sent": 1, "received": 1, "acked": 1}
    assert verdict(forger, Left(counters=right)) == ""
    assert "counters don't add up" in verdict(forger, Left(counters={**right, "ready": 1}))
    assert "counters: acked is 2" in verdict(forger, Left(counters={**right, "sent": 2, "acked": 2}))
    assert "counters: received is 0" in verdict(forger, Left(counters={**right, "received": 0}))
    assert "there are 0 dead letters" in verdict(forger, Left(counters={**right, "sent": 2, "dead": 1}))


def test_the_checker_sees_a_damaged_file(forger) -> None:
    assert "the file is damaged: row 3" in verdict(forger, Left(integrity="row 3 missing from index"))


def test_the_checker_sees_what_could_not_be_received_in_the_end(forger) -> None:
    assert "cannot be received: bills after 60 s" in verdict(forger, Left(undrained="bills after 60 s: 3 ready"))


def test_a_history_is_read_as_it_was_written(tmp_path, forger) -> None:
    history = History(tmp_path / "history")
    history.write(*forger.history[:2])
    with (tmp_path / "history").open("ab") as cut:
        cut.write(b'\n[{"process":"producer-1')  # as a kill leaves it
    history.write(*forger.history[2:])
    history.close()
    assert read(tmp_path / "history") == forger.history
