"""What is counted agrees with its number: one message, two messages."""

import pytest

import filao
from filao.dashboard.texts import texts
from filao.languages import fill
from filao.overview import Deed, deeds_finding, miscounted
from filao.printable import some
from filao.queue import full
from filao.slices import Tally
from tests.support.shell import bury, compiled, counted, db, sent_to_terminal

__all__ = ["compiled", "db"]

CLAIMS: filao.Queue = filao.Queue("claims", max_length=1)


def _tallied(done: int) -> str:
    tally = Tally()
    tally.done = done
    with pytest.raises(filao.EngineError) as caught, tally:
        raise filao.EngineError("away")
    return str(caught.value)


def _log(entries: int) -> str:
    return deeds_finding(entries, [Deed("ana", "redrive", "claims", wanted=entries)] * entries)[0].text


@pytest.mark.parametrize(
    ("said", "of_one", "of_two"),
    [
        (lambda n: some(n, "lease"), "1 lease", "2 leases"),
        (lambda n: some(1_000 * n, "message", ("is", "are")), "1,000 messages are", "2,000 messages are"),
        (lambda n: miscounted(n, "ready", 3 - n), "1 message is counted as ready, and 2 are", "and 1 is there"),
        (_log, "1 of 1 entry without an end", "2 of 2 entries without an end"),
        (_log, "0 of 1 message.", "0 of 2 messages."),
        (lambda n: deeds_finding(n, [])[0].text, "1 entry, each", "2 entries, each"),
        (lambda n: str(full(CLAIMS, n, 1)), "1 message waits or is being", "2 messages wait or are being"),
        (_tallied, "1 message is done", "2 messages are done"),
    ],
)
def test_one_is_said_of_one_and_more_of_more(said, of_one, of_two) -> None:
    assert of_one in said(1)
    assert of_two in said(2)


def test_a_deed_that_is_not_about_messages_is_told_without_their_number() -> None:
    assert "messages" not in deeds_finding(1, [Deed("ana", "pause", "claims")])[0].text


@pytest.mark.parametrize(("language", "kind"), [("en", "1 kind"), ("fr", "1 sorte")])
def test_the_dashboard_tells_one_kind_of_dead_letters_as_one(language, kind) -> None:
    for kinds, ends in ((1, kind), (2, "s")):
        assert (
            fill(language, texts(language)["dead_count"], {"n": 2, "count": 2, "k": kinds, "kinds": kinds})[
                -len(ends) :
            ]
            == ends
        )


def test_an_id_that_is_given_twice_is_one_dead_letter(db) -> None:
    (one,) = bury(db, {"claim": 1})
    code, screen = sent_to_terminal("discard", db, "claims", "--id", one, "--id", one, types=b"y\n", when=b"[y/N]")
    assert "Delete 1 dead letter of queue" in screen
    assert (code, counted(db).dead) == (0, 0)
