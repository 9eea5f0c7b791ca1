"""How the house measures: `python -m tests.house [FOLDER]` prints it of `src/filao`, or of another checkout's.

`git archive COMMIT src | tar -x -C /tmp/before`, and then `python -m tests.house /tmp/before/src/filao`, compares.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

COLUMNS_MAX = 120

Graph = Mapping[str, set[str]]


def measures(source: Path) -> Iterator[tuple[str, object]]:
    """Yield what is measured, and what it comes to."""
    paths = sorted(path for path in source.rglob("*.py") if path.parent.name != "programs")  # which are a learner's
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = sorted(lines(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    modules = sorted(text.count("\n") for text in texts.values())
    yield "modules", len(modules)
    yield "module lines, median / most", f"{median(modules):g} / {modules[-1]}"
    yield "functions", len(functions)
    ranks = [functions[min(len(functions) - 1, round(len(functions) * share))] for share in (0.9, 0.99)]
    yield (
        "function lines, median / p90 / p99 / most",
        " / ".join(map(str, [f"{median(functions):g}", *ranks, functions[-1]])),
    )
    yield "class lines, most", _most((lines(node), node.name) for node in classes)
    yield "public methods of a class, most", _most((len(public_methods(node)), node.name) for node in classes)
    yield "classes with more than 15 methods", sum(len(public_methods(node)) > 15 for node in classes)
    wide = [line for text in texts.values() for line in text.splitlines() if len(line) > COLUMNS_MAX]
    yield f"lines over {COLUMNS_MAX} columns", len(wide)
    graph = {_name(path, source): set(_imported(tree, source)) for path, tree in trees.items()}
    yield "imports among modules", sum(map(len, graph.values()))
    yield "modules in a circle of imports", len(_circles(graph))
    seam = next((node for node in classes if node.name == "Engine" and "Protocol" in ast.dump(node)), None)
    if seam is not None:
        yield "members of the seam", len(public_methods(seam))


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Return how many lines a function or a class takes, signature and docstring included."""
    return (node.end_lineno or 0) - node.lineno + 1


def public_methods(node: ast.ClassDef) -> set[str]:
    """Return the names of a class's methods and properties that others may use."""
    found = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {one.name for one in found if not one.name.startswith("_")}


def _most(found: Iterator[tuple[int, str]]) -> str:
    return "{} ({})".format(*max(found))


def _name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, source: Path) -> Iterator[str]:
    """Yield the modules of ours that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "filao":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                place = source / inner.replace(".", "/")
                yield inner if place.with_suffix(".py").exists() or place.is_dir() else module


def _circles(graph: Graph) -> set[str]:
    """Return the modules that reach themselves; the package's own face, which all may name, is none."""
    return {name for name in graph if name and name in _reached(graph, name)}


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name and name not in seen:
            seen.add(name)
            ahead += graph.get(name, ())
    return seen


if __name__ == "__main__":
    for what, value in measures(Path(sys.argv[1] if len(sys.argv) > 1 else "src/filao")):
        print(f"{what}: {value}")
