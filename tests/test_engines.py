"""What each engine can do, and that the docs say just that."""

import ast
import inspect
import re
from pathlib import Path

from filao import engine as engine_module
from filao.batching import Confirming
from filao.engine import Engine, Feature, Immediate, Operators
from filao.engines import engine_for
from filao.engines.postgresql import PostgresqlEngine
from filao.engines.rabbitmq import RabbitmqEngine
from filao.engines.sqlite import SqliteEngine
from filao.moving import Movable, Mover
from filao.overview import Founding, Seen
from filao.session import Pushing

ENGINES = (SqliteEngine, PostgresqlEngine, RabbitmqEngine)
SEAM_MAX = 14  # members that a broker asks an engine for
PAGE = Path(__file__).parent.parent / "docs" / "en" / "reference" / "engines.md"


def _explained() -> dict[str, str]:
    """Return what `engine.py` says of each feature."""
    (written,) = [
        node
        for node in ast.parse(inspect.getsource(engine_module)).body
        if isinstance(node, ast.ClassDef) and node.name == "Feature"
    ]
    said: dict[str, str] = {}
    for member, docstring in zip(written.body[1::2], written.body[2::2], strict=True):
        assert isinstance(member, ast.Assign)
        assert isinstance(docstring, ast.Expr)
        assert isinstance(docstring.value, ast.Constant)
        said[member.targets[0].id.lower()] = str(docstring.value.value)  # type: ignore[attr-defined]  # it is a name
    return said


def table() -> str:
    """Return the table of the docs."""
    lines = [
        f"| feature | {' | '.join(engine.name for engine in ENGINES)} | |",
        "|---|" + "---|" * len(ENGINES) + "---|",
    ]
    for feature, said in _explained().items():
        how = [
            "native" if feature in engine.features else "by opt-in" if feature in engine.emulated else "no"
            for engine in ENGINES
        ]
        lines.append(f"| `{feature}` | {' | '.join(how)} | {said} |")
    return "\n".join(lines)


def test_the_docs_say_what_each_engine_can_do() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_the_french_docs_say_the_same() -> None:
    french = {"native": "oui", "by opt-in": "sur demande", "no": "non"}
    page = PAGE.parents[2] / "fr" / "reference" / "engines.md"
    said = re.findall(r"^\| `(\w+)` \| (.*) \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [(feature, cells.split(" | ")[:3]) for feature, cells in said] == [
        (feature, [french[cell] for cell in cells.split(" | ")[:3]])
        for feature, cells in re.findall(r"^\| `(\w+)` \| (.*) \|", table(), flags=re.MULTILINE)
    ]


def _members(seam: type) -> set[str]:
    return {name for name in vars(seam) if not name.startswith("_")}


def _made() -> list[Movable]:
    return [engine_for(url) for url in ("sqlite://:memory:", "postgresql://localhost/claims", "amqp://localhost/")]


def test_a_broker_asks_little_of_an_engine() -> None:
    assert len(_members(Engine)) <= SEAM_MAX


def test_an_engine_and_what_it_hands_out_show_nothing_but_the_seam() -> None:
    for engine in _made():
        shown = {name for name in dir(engine) if not name.startswith("_")}
        some_have = _members(Immediate) | _members(Confirming) | _members(Seen) | _members(Pushing) | _members(Founding)
        assert shown - some_have == _members(Engine) | _members(Movable)
        assert {name for name in dir(engine.mover) if not name.startswith("_")} == _members(Mover)
        assert {name for name in dir(engine.operators) if not name.startswith("_")} >= _members(Operators)


def test_what_an_engine_cannot_do_it_hands_nothing_out_for() -> None:
    for engine in _made():
        assert (engine.transactions is None) == (Feature.TRANSACTIONS not in engine.features)
        assert (engine.transactions is None) == (Feature.WITHIN not in engine.features)
        assert (engine.operators.pausing is None) == (Feature.PAUSE not in engine.features)


def test_what_can_be_done_natively_is_not_imitated() -> None:
    for engine in ENGINES:
        assert not engine.features & engine.emulated
    assert _explained().keys() == set(Feature)
