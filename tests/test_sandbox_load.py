"""The numbers beside the sliders: what queueing theory predicts, in cases that can be worked out by hand."""

import pytest

from filao.sandbox.load import VARIATION_OF_WORK, predicted


def test_a_single_consumer_follows_pollaczek_and_khinchine() -> None:
    found = predicted(arrivals=0.5, work=1.0, consumers=1, failing=0.0)
    assert found.busy == 0.5
    waiting = 0.5 / (1 - 0.5) * (1 + VARIATION_OF_WORK**2) / 2
    assert found.latency == pytest.approx(1.0 + waiting)


def test_little_s_law_holds() -> None:
    found = predicted(arrivals=4.0, work=0.5, consumers=3, failing=0.1)
    assert found.latency is not None
    assert found.depth == pytest.approx(found.arrivals * found.latency)


def test_failures_cost_attempts() -> None:
    assert predicted(1.0, 0.5, 2, 0.5).busy == pytest.approx(2 * (predicted(1.0, 0.5, 2, 0.0).busy or 0.0))


@pytest.mark.parametrize(("arrivals", "consumers"), [(4.0, 1), (2.0, 1), (1.0, 0)])
def test_more_than_can_be_done_grows_without_end(arrivals, consumers) -> None:
    found = predicted(arrivals, 0.5, consumers, 0.0)
    assert (found.depth, found.latency) == (None, None)


def test_where_nothing_arrives_nothing_grows_though_nobody_works() -> None:
    assert predicted(0.0, 0.5, 0, 0.0).depth == 0.0
    assert predicted(2.0, 0.5, 0, 0.0).busy is None


def test_an_empty_queue_costs_only_the_work() -> None:
    assert predicted(0.0, 0.5, 2, 0.0).latency == pytest.approx(0.5)


def test_more_consumers_wait_less() -> None:
    waits = [predicted(3.0, 0.5, consumers, 0.0).latency or 0.0 for consumers in (2, 3, 4, 6)]
    assert waits == sorted(waits, reverse=True)
