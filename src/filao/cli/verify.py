"""`filao verify`: does this server keep the promises?"""

import asyncio
import logging
import sys
from collections.abc import Sequence

import click

from filao.broker import connect
from filao.cli.shell import addressed, as_json, check_file, is_terminal, note, print_lines
from filao.cli.tables import draw
from filao.conformance import Verdict, verify
from filao.engine import Feature


@click.command(name="verify")
@click.argument("arguments", nargs=-1, metavar="[URL]")
@click.option("--json", "wants_json", is_flag=True, help="JSON lines, one for each check, also on a terminal.")
def verify_command(*, arguments: tuple[str, ...], wants_json: bool) -> int:
    """Run the contract against your own server.

    It says what the server can do, takes about a minute, and works in queues of its own, which it deletes. The exit
    code is 1 when a promise is not kept.
    """
    from rich.console import Console
    from rich.progress import Progress

    url, _ = addressed(arguments, least=0, most=0)
    check_file(url)
    logging.getLogger("filao").addHandler(logging.NullHandler())  # what the checks provoke is no news
    with Progress(console=Console(stderr=True), transient=True, disable=not is_terminal(sys.stderr)) as progress:
        task = progress.add_task("checking", total=None)

        def on_verdict(verdict: Verdict) -> None:
            progress.update(task, advance=1, description=verdict.check[:60])

        verdicts = asyncio.run(verify(lambda: connect(url), on_verdict))
    failed = [verdict for verdict in verdicts if verdict.error]
    if wants_json or not is_terminal(sys.stdout):
        print_lines(as_json(verdict) for verdict in verdicts)
    else:
        engine = connect(url)
        draw(("feature", "here", "checks"), table(engine.features, engine.emulated, verdicts), figures=False)
    for verdict in failed:
        note(f"FAILED: {verdict.check}: {verdict.error}")
    note(f"{len(verdicts) - len(failed)} of {len(verdicts)} checks passed")
    return 1 if failed else 0


def table(
    features: frozenset[Feature], emulated: frozenset[Feature], verdicts: Sequence[Verdict]
) -> list[tuple[str, str, str]]:
    """Return a line for each feature: how the engine does it, and how many of its checks were passed."""
    lines = [("what every engine does", "yes", _passed([verdict for verdict in verdicts if not verdict.features]))]
    for feature in Feature:
        how = "native" if feature in features else "by opt-in" if feature in emulated else "no"
        lines.append((feature, how, _passed([verdict for verdict in verdicts if feature in verdict.features])))
    return lines


def _passed(verdicts: Sequence[Verdict]) -> str:
    return f"{sum(not verdict.error for verdict in verdicts)} of {len(verdicts)}" if verdicts else ""
