"""The sandbox's ledger of effects: what became of each claim, and why; computed from records alone."""

import pytest

from filao.engines.sqlite.folder import Folder
from filao.engines.sqlite.turnstile import Turnstile, is_passable
from filao.sandbox.effects import Effects, Payment
from filao.sandbox.journal import PORTAL, Record, What
from filao.sandbox.lanes import Lanes

MESSAGE = "file-1"


class Story:
    """Tells lanes and effects what happened, step by step."""

    def __init__(self) -> None:
        self.lanes, self.effects = Lanes(), Effects()
        self._now = 0.0
        self._payments = 0
        for worker in (1, 2):
            self.lanes.expect(worker, 100 + worker)
        self.effects.sent(MESSAGE, 7)

    def did(self, worker: int, what: What, attempt: int = 1, note: str = "") -> "Story":
        self._now += 1
        self.lanes.feed(Record(self._now, worker, what, MESSAGE, 7, attempt, note=note))
        return self

    def paid(self, worker: int | str, attempt: int = 1) -> "Story":
        if isinstance(worker, int):
            self.did(worker, "handled", attempt)
        self._payments += 1
        self.effects.paid([Payment(self._payments, MESSAGE, 7, 100, str(worker), attempt)])
        return self

    def killed(self, worker: int) -> "Story":
        self._now += 1
        self.lanes.left(worker, self._now, "killed")
        return self

    def is_gone(self) -> "Story":
        self.effects.audit(set())
        self.effects.audit(set())
        return self

    def doubled(self) -> list[tuple[int, str]]:
        return [(wrong.paid, wrong.cause) for wrong in self.effects.doubled(self.lanes)]

    def lost(self) -> list[str]:
        return [wrong.cause for wrong in self.effects.lost(self.lanes)]


def test_a_claim_paid_once_is_neither_lost_nor_doubled() -> None:
    story = Story().did(1, "received").paid(1).did(1, "acked").is_gone()
    assert (story.doubled(), story.lost()) == ([], [])


def test_a_claim_is_paid_twice_because_its_first_worker_was_killed_before_the_ack() -> None:
    story = Story().did(1, "received").paid(1).killed(1).did(2, "received", 2).paid(2, 2).did(2, "acked", 2).is_gone()
    assert (story.doubled(), story.lost()) == ([(2, "killed")], [])
    assert [event.key for event in story.lanes.events] == ["killed_holding", "took_over"]


def test_a_claim_is_paid_twice_because_its_first_worker_overslept() -> None:
    first = Story().did(1, "received").paid(1).did(2, "received", 2).paid(2, 2).did(2, "acked", 2).did(1, "refused")
    last = Story().did(1, "received").did(2, "received", 2).paid(2, 2).did(2, "acked", 2).paid(1).did(1, "refused")
    assert first.is_gone().doubled() == last.is_gone().doubled() == [(2, "overslept")]


def test_a_claim_paid_twice_by_a_worker_that_lives_is_not_explained() -> None:
    story = Story().did(1, "received").paid(1).paid(1).did(1, "acked").is_gone()
    assert story.doubled() == [(2, "")]


def test_a_claim_acknowledged_before_its_worker_was_killed_is_lost() -> None:
    story = Story().did(1, "received", note="once").is_gone()
    assert story.lost() == []  # its worker is still at it
    story.killed(1)
    assert story.lost() == ["killed"]


def test_a_claim_received_at_most_once_that_failed_is_lost() -> None:
    assert Story().did(1, "received", note="once").did(1, "failed", note="no policy").is_gone().lost() == ["failed"]


def test_a_claim_that_vanished_without_a_reason_is_lost_and_not_explained() -> None:
    assert Story().is_gone().lost() == [""]


@pytest.mark.parametrize("looks", [0, 1])
def test_a_claim_that_one_look_did_not_find_may_only_have_moved(looks: int) -> None:
    story = Story()
    for _ in range(looks):
        story.effects.audit(set())
    story.effects.audit({MESSAGE})
    assert story.lost() == []


def test_a_claim_that_an_operator_removed_is_not_lost() -> None:
    story = Story()
    story.effects.removed([MESSAGE])
    assert story.is_gone().lost() == []


def test_a_send_that_is_written_down_after_its_delivery_is_not_the_latest() -> None:
    lanes = Story().did(1, "received").lanes
    lanes.move(Record(9.0, PORTAL, "sent", MESSAGE, 7))
    latest = lanes.latest(7)
    assert latest is not None
    assert latest.what == "received"


def test_one_gets_through_a_turnstile_in_which_nobody_stands(tmp_path) -> None:
    turnstile = Turnstile(Folder(tmp_path, tmp_path.stat()))
    assert turnstile.try_enter()
    assert not is_passable(tmp_path, 0.01)
    turnstile.leave()
    assert is_passable(tmp_path, 0.01)
    turnstile.close()
