"""The rules of the house that no linter knows."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import filao
from tests.house import lines, public_methods

SOURCE = Path(filao.__file__).parent
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.parent.name != "programs")  # which are a learner's
ORDER = [  # what stands above; a module imports only from here upwards
    *(
        "errors",
        "extras",
        "urls",
        "printable",
        "guarded",
        "forks",
        "codec",
        "checks",
        "queue",
        "engine",
        "slices",
        "process",
        "overview",
        "draft",
        "observing",
        "opentelemetry",
        "batching",
        "session",
        "message",
        "connections",
        "tables",
        "moving",
    ),
    *("engines.waiters", "engines.statements", "engines.rows"),
    *(
        "engines.sqlite.folder",
        "engines.sqlite.wal",
        "engines.sqlite.ground",
        "engines.sqlite.turnstile",
        "engines.sqlite.bell",
        "engines.sqlite.mounts",
        "engines.sqlite.own",
        "engines.sqlite.files",
        "engines.sqlite.scrutiny",
        "engines.sqlite.thread",
    ),
    *(
        f"engines.sqlite.{name}"
        for name in (
            *("clock", "books", "moves", "waitlist", "send", "receive", "settle", "verbs", "operators", "processes"),
            *(
                "stats",
                "foreign",
                "hold",
                "database",
                "jobs",
                "housekeeping",
                "presence",
                "transactions",
                "backup",
                "doctor",
                "control",
                "overview",
                "moving",
                "engine",
            ),
        )
    ),
    *("engines.sqlite",),
    *(
        f"engines.postgresql.{name}"
        for name in (
            "charset",
            "server",
            "links",
            "schema",
            "clock",
            "main",
            "verbs",
            "apart",
            "transactions",
            "listener",
            "watch",
            "doctor",
            "control",
            "overview",
            "moving",
            "engine",
        )
    ),
    *(
        f"engines.rabbitmq.{name}"
        for name in (
            "wire",
            "outlet",
            "client",
            "server",
            "topology",
            "refusals",
            "envelope",
            "register",
            "consumer",
            "publisher",
            "burials",
            "settles",
            "doctor",
            "errands",
            "control",
            "overview",
            "moving",
            "engine",
        )
    ),
    *("engines.postgresql", "engines.rabbitmq", "engines"),
    *(
        "outbox",
        "at_most_once",
        "receiving",
        "broker",
        "relay",
        "calls",
        "company",
        "outside",
        "loop_thread",
        "sync",
    ),
    *(f"worker.{name}" for name in ("signals", "outage", "outcomes", "handlers", "threads", "pulse", "keeper")),
    *(f"worker.{name}" for name in ("surroundings", "strays", "handling", "run", "pool", "shift", "worker")),
    *(
        "worker",
        "worker.supervisor",
        "testing",
        "contrib",
        "prometheus",
        "prometheus.store",
        "prometheus.worker",
        "conformance.stage",
    ),
    *(
        f"conformance.{name}"
        for name in ("control", "delivery", "effects", "failure", "history", "ordering", "sending")
    ),
    *("conformance.verification", "conformance", "languages", "door", "dashboard", "sandbox", "cli", "__main__"),
]
MODULE_MAX = 575  # lines
FUNCTION_MAX = 60  # lines, signature and docstring included
CLASS_MAX = 350  # lines
METHODS_MAX = 25  # public ones of a class


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _rank(name: str) -> int:
    while name and name not in ORDER:
        name = name.rpartition(".")[0]
    return ORDER.index(name) if name else -1


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("filao"):
            module = (node.module or "").removeprefix("filao").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if (SOURCE / inner.replace(".", "/")).with_suffix(".py").exists() else module


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent != SOURCE or path.stem != "__init__"], ids=_name
)
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    rank = _rank(_name(path))
    assert rank >= 0, "a new module: give it a place in ORDER"
    for imported in _imported(path):
        inside = _rank(imported) == rank and imported != _name(path)  # modules of one package that ORDER does not list
        assert imported == "" or _rank(imported) < rank or inside, f"{_name(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_is_short_and_so_are_its_classes_and_functions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MODULE_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines(node) <= FUNCTION_MAX, node.name
        if isinstance(node, ast.ClassDef):
            assert lines(node) <= CLASS_MAX, node.name
            assert len(public_methods(node)) <= METHODS_MAX, node.name


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def _public() -> Iterator[tuple[str, object]]:
    import filao.sync

    for module in (filao, filao.sync):
        names = getattr(module, "__all__", ["connect", "Broker", "Message", "Transaction"])
        for name in names:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):  # not the alias of a type
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for member, attribute in vars(value).items():
                    if not member.startswith("_") and callable(attribute):
                        yield f"{module.__name__}.{name}.{member}", attribute


@pytest.mark.parametrize(("name", "value"), list(_public()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_public_name_is_documented(name: str, value: object) -> None:
    assert name
    assert inspect.getdoc(value)


def test_every_module_can_be_imported_alone() -> None:
    for module in pkgutil.walk_packages([str(SOURCE)], "filao."):
        if module.name != "filao.__main__":
            importlib.import_module(module.name)


def test_nothing_is_unpickled_and_no_text_is_run() -> None:
    unpickling, running = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, {"eval", "exec"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & unpickling, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in running, path


def test_no_parameter_of_sqlite_has_a_number() -> None:
    """Python 3.12.0 to 3.12.3 take `?1` for a named one, and warn of a sequence of values."""
    for path in (SOURCE / "engines" / "sqlite").rglob("*.*"):
        if path.suffix in (".py", ".sql"):
            assert not re.search(r"\?[0-9]", path.read_text(encoding="utf-8")), path


def test_sql_keeps_to_120_columns() -> None:
    lines = [line for path in SOURCE.rglob("*.sql") for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines
    assert [line for line in lines if len(line) > 120] == []


def test_house_words_are_used() -> None:
    unwanted = {"manager", "helper", "util", "utils", "common", "base"}
    assert not unwanted & {path.stem for path in MODULES}
