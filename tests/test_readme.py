"""The code of the README and of the recipes runs as it stands, block after block, in an empty folder."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "recipes.md"], ids=lambda page: page.name)
async def test_the_code_of_a_page_runs(tmp_path, monkeypatch, page) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        code = compile(block, f"{page.name}, block {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, names)
        if running is not None:
            await running


def test_the_diagram_is_the_one_of_the_package() -> None:
    import filao

    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines()]

    diagram = re.search(r"```\n( send.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert diagram is not None
    assert set(lines(diagram[1])) <= set(lines(filao.__doc__ or ""))
