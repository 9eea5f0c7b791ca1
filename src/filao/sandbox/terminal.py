"""The demo, a program for the terminal: `make demo`, or `python -m filao.sandbox.terminal`.

It plays EVT-02 in a temporary folder, shows it, prints the ledger, and removes all it made. The exit code tells whether
the ledger balances.
"""

import asyncio
import io
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

if not (find_spec("click") and find_spec("rich")):
    sys.stderr.write("filao: the demo needs click and rich: pip install 'filao[cli]'\n")
    sys.exit(2)

import click
from rich.console import Console

from filao.errors import FilaoError
from filao.sandbox.board import KILL_MOMENTS, KillWhen
from filao.sandbox.claims import CLAIMS_MAX, BadClaimsError, Claim, from_csv, made_up
from filao.sandbox.crew import CrewError
from filao.sandbox.display import LiveDisplay, PlainDisplay
from filao.sandbox.report import print_ledger
from filao.sandbox.scenario import DEADLINE, Play, Scenario, TooSlowError
from filao.sandbox.tamper import TAMPERINGS, tamper
from filao.sandbox.texts import LANGUAGES, Language, Voice

BALANCED, UNBALANCED, WRONG_USAGE = 0, 1, 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end it early; its exit code is then 128 + the signal

COUNT = 300
SECONDS = 20.0
WORKERS_MAX = 12  # that find a line of their own on a terminal
PLAIN_WIDTH = 100  # columns of the ledger where there is no terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--count", type=click.IntRange(1, CLAIMS_MAX), help=f"How many claims are made up.  [default: {COUNT}]")
@click.option("--seed", type=int, default=7, show_default=True, help="What they are made up from, and what goes wrong.")
@click.option(
    "--claims",
    "csv_file",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Real claims instead: a CSV file with the columns IDpol and ClaimAmount.",
)
@click.option("--limit", type=click.IntRange(1, CLAIMS_MAX), help="The first so many of these.  [default: all]")
@click.option("--workers", type=click.IntRange(1, WORKERS_MAX), default=3, show_default=True, help="How many compete.")
@click.option("--no-kill", is_flag=True, help="Kill nobody.")
@click.option(
    "--kill-when",
    type=click.Choice(list(KILL_MOMENTS)),
    default="work",
    show_default=True,
    help="Kill a worker in the middle of its work, or between its work and its ack.",
)
@click.option("--restart", is_flag=True, help="Start a new worker in the place of the killed one.")
@click.option(
    "--seconds", type=click.FloatRange(0.5, 40), default=SECONDS, show_default=True, help="How long it takes, about."
)
@click.option("--language", type=click.Choice(LANGUAGES), default="en", show_default=True)
@click.option(
    "--file", "kept_file", type=click.Path(path_type=Path), metavar="PATH", help="Keep the queue in this file."
)
@click.option(
    "--tamper",
    "tampering",
    type=click.Choice(list(TAMPERINGS)),
    help="Falsify a worker's journal before the ledger is drawn up, and see that it fails.",
)
def play(
    *,
    count: int | None,
    seed: int,
    csv_file: Path | None,
    limit: int | None,
    workers: int,
    no_kill: bool,
    kill_when: str,
    restart: bool,
    seconds: float,
    language: str,
    kept_file: Path | None,
    tampering: str | None,
) -> int:
    """Watch EVT-02: a portal sends insurance claims, workers compete for them, and half-way one is killed.

    All of it is real: processes of their own, one SQLite file in a temporary folder, a SIGKILL. It ends with a ledger,
    computed from what the processes wrote down, and compared with the engine's own counters.

    \b
    Exit codes:
      0    the ledger balances
      1    it does not, or the demo could not be played to its end
      2    wrong usage, or a file of claims that cannot be used
      130  interrupted by Ctrl-C (and 143 by SIGTERM, 129 by SIGHUP)
    """  # noqa: D301  # click's mark for a paragraph that is not wrapped is a real backspace
    if workers == 1 and not (no_kill or restart):
        raise click.UsageError("A single worker cannot be killed: nobody would take over. Add --restart or --no-kill.")
    if kept_file is not None and os.path.lexists(kept_file):
        raise click.UsageError(f"--file: {kept_file} exists. The ledger counts from zero: name a file that does not.")
    scenario = Scenario(
        claims=_claims(csv_file, limit, count, seed),
        seed=seed,
        workers=workers,
        seconds=seconds,
        language=cast("Language", language),
        kill_when=None if no_kill else cast("KillWhen", kill_when),
        restart=restart,
    )
    return asyncio.run(_perform(scenario, kept_file, tampering))


def _claims(csv_file: Path | None, limit: int | None, count: int | None, seed: int) -> Sequence[Claim]:
    if csv_file is None:
        if limit is not None:
            raise click.UsageError("--limit goes with --claims; how many are made up is said by --count")
        return made_up(seed, count or COUNT)
    if count is not None:
        raise click.UsageError("--count goes without --claims; how many are taken of a file is said by --limit")
    return from_csv(csv_file, limit)


# --- one performance -------------------------------------------------------------------------------------------------


async def _perform(scenario: Scenario, kept_file: Path | None, tampering: str | None) -> int:
    """Play, and return the exit code; whatever happens, no process is left, and no file but the one to be kept."""
    say = Voice(scenario.language)
    signalled = _end_on_signals()
    try:
        with tempfile.TemporaryDirectory(prefix="filao-demo-") as folder:
            file = kept_file or Path(folder) / "claims.db"
            balances = await _play_in(Path(folder), file, scenario, tampering)
    except asyncio.CancelledError:
        if not signalled:
            raise
        _note(say("interrupted"))
        return 128 + signalled[0]
    except TooSlowError as error:
        handled, total = say.number(error.handled), say.number(len(scenario.claims))
        _note(say("too_slow", seconds=round(DEADLINE), handled=handled, all=total))
        return UNBALANCED
    except CrewError as error:
        _note(say("crew_failed", why=str(error)))
        return UNBALANCED
    if kept_file is not None:
        _note(say("kept", file=str(kept_file), command=f"filao stats {kept_file}"))
    return BALANCED if balances else UNBALANCED


async def _play_in(folder: Path, file: Path, scenario: Scenario, tampering: str | None) -> bool:
    """Play, print the ledger, and return whether it balances."""
    say = Voice(scenario.language)
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else PLAIN_WIDTH)
    is_live = is_terminal and not console.is_dumb_terminal
    display = (LiveDisplay if is_live else PlainDisplay)(console, say, _told(say, scenario))
    with display:
        play = Play(scenario, file, folder, display)
        await play.perform()
    if tampering is not None:
        tamper(folder, tampering)
    ledger = await play.ledger()
    print_ledger(console, say, ledger, hunted=scenario.kill_when is not None)
    return ledger.balances


def _told(say: Voice, scenario: Scenario) -> str:
    key = "told" if scenario.workers > 1 else "told_alone"
    told = say(key, count=say.number(len(scenario.claims)), workers=scenario.workers)
    return told if scenario.kill_when is None else f"{told} {say('told_kill')}"


def _end_on_signals() -> list[int]:
    """Let the first signal cancel the performance, and those after it nothing; return where it is written down."""
    signalled: list[int] = []
    task = asyncio.current_task()
    assert task is not None

    def end(number: int) -> None:
        if not signalled:
            signalled.append(number)
            task.cancel()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    return signalled


def _note(text: str) -> None:
    """Say something to whoever runs this, past what is piped on."""
    click.echo(f"filao: {text}", err=True)


def main() -> None:
    """Run the demo and exit with its code."""
    if os.name != "posix":
        _note("the demo stops and kills processes as Linux and macOS do it; it does not run here")
        sys.exit(UNBALANCED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shall see what it can
    sys.exit(_run())


def _run() -> int:
    """Return the exit code of the demo, or of what it raised."""
    try:
        code = play.main(prog_name="filao.sandbox.terminal", standalone_mode=False)
    except click.Abort:
        return 128 + signal.SIGINT
    except click.ClickException as error:
        error.show()
        return WRONG_USAGE
    except BadClaimsError as error:
        _note(str(error))
        return WRONG_USAGE
    except (FilaoError, OSError) as error:
        _note(str(error))
        return UNBALANCED
    return code if isinstance(code, int) else BALANCED


if __name__ == "__main__":
    main()
