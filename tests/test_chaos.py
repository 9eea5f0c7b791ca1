"""A short scenario of `tests.chaos`, and proof that its account tells what was lost and what was done twice."""

import subprocess
import sys
from pathlib import Path

from tests.chaos import __main__ as chaos
from tests.chaos.account import SCENARIOS, Chaos, Scenario
from tests.support.load import Load

ROOT = Path(__file__).parent.parent


def test_a_scenario_is_played_alone_and_its_row_is_printed(postgres) -> None:
    """`postgres` skips it where none is installed."""
    command = [sys.executable, "-m", "tests.chaos", "backend-kill"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| backend-kill | PostgreSQL |" in run.stdout


def account(*, confirmed: str, handled: str, acked: str) -> Chaos:
    load = Load()
    load.confirmed.update(confirmed)
    load.handled.update(handled)
    load.acked.update(acked)
    return Chaos(load, recoveries=[0.1])


def played(engine: str, found: Chaos, capsys) -> tuple[bool, str]:
    async def play(folder: Path) -> Chaos:
        return found

    kept = chaos.play(Scenario("made-up", engine, play, ""))
    return kept, capsys.readouterr().out


def test_what_is_lost_or_done_twice_breaks_a_promise_and_what_is_only_delivered_twice_does_not(capsys) -> None:
    kept, row = played("PostgreSQL", account(confirmed="ab", handled="aab", acked="ab"), capsys)
    assert kept
    assert "| made-up | PostgreSQL | 0.10 | 0.00 | 2 | 0 | 0 | 1 |" in row
    kept, row = played("PostgreSQL", account(confirmed="ab", handled="a", acked="a"), capsys)
    assert not kept
    assert "| 2 | 1 | 0 | 0 |" in row
    twice = account(confirmed="a", handled="aa", acked="aa")
    assert not played("PostgreSQL", twice, capsys)[0]
    assert played("RabbitMQ", twice, capsys)[0], "it has no fencing, and says so"


def test_a_scenario_that_fails_does_not_count_as_kept(capsys) -> None:
    async def play(folder: Path) -> Chaos:
        raise TimeoutError

    assert not chaos.play(Scenario("made-up", "PostgreSQL", play, ""))


def test_every_scenario_says_what_happens() -> None:
    assert all(scenario.story for scenario in SCENARIOS.values())
