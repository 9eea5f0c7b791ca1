"""The code of the README and of the site runs as it stands, block after block, in an empty folder for each page.

The language tag says what becomes of a block: `python` is run, with `await` at the top level; with a title it is a file
that is written; `sh` is run by a shell. Everything else is only shown: `py` and `console` what needs a server, another
machine or another terminal.
"""

import ast
import asyncio
import dataclasses
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import filao
from filao.cli import commands

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.fr.md"]
ENGLISH, FRENCH = ROOT / "docs" / "en", ROOT / "docs" / "fr"
SITE = sorted([*ENGLISH.rglob("*.md"), *FRENCH.rglob("*.md")])
SHOWN = {"", "console", "dockerfile", "ini", "json", "py", "sql", "text", "toml", "yaml"}
SHELL_TAKES_AT_MOST = 120  # seconds for one block, on a machine that does other things too
SERVERS: dict[str, Callable[[pytest.FixtureRequest], str]] = {
    "amqp://guest:guest@127.0.0.1:5672/": lambda request: str(request.getfixturevalue("rabbitmq").url()),
}


class Block(NamedTuple):
    """A block of code, and what its fence says of it."""

    language: str
    title: str | None
    code: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for info, code in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        title = re.search(r'title="([^"]+)"', info)
        yield Block(info.partition(" ")[0], title[1] if title else None, code)


def _named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _french() -> list[Path]:
    return sorted(FRENCH.rglob("*.md"))


def _meant(page: Path) -> list[tuple[str, str | None, str]]:
    """Return what a page has run, without comments."""
    meant: list[tuple[str, str | None, str]] = []
    for block in blocks_of(page):
        if block.language == "python":
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
            meant.append((block.language, block.title, ast.dump(compile(block.code, str(page), "exec", flags=flags))))
        elif block.language == "sh":
            meant.append((block.language, block.title, re.sub(r"\s+#.*$", "", block.code, flags=re.MULTILINE)))
    return meant


def _with_code() -> list[Path]:
    """Return the pages that run, in English and, where more than the comments is French, in French."""
    english = {page: _meant(page) for page in (READMES[0], *sorted(ENGLISH.rglob("*.md")))}
    french = {page: _meant(page) for page in (READMES[1], *_french())}
    return [page for page, meant in english.items() if meant] + [
        page for page, meant in french.items() if meant and meant not in english.values()
    ]


@pytest.mark.parametrize("page", _with_code(), ids=_named)
async def test_the_code_of_a_page_runs(tmp_path, monkeypatch, request, page) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for number, block in enumerate(blocks_of(page), 1):
            code = block.code
            for url, own in SERVERS.items():
                code = code.replace(url, own(request)) if url in code else code
            where = f"{_named(page)}, block {number}"
            if block.language == "python" and block.title:
                Path(block.title).write_text(code, encoding="utf-8")
            elif block.language == "python":
                running = eval(compile(code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
                if running is not None:
                    await running
            elif block.language == "sh":
                await _shell(code, where)
    finally:
        for name in set(sys.modules) - known:  # another page may have a module of this name
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


async def _shell(code: str, where: str) -> None:
    """Run a block in a session of its own, with the interpreter and the `filao` of these tests first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-eu", "-c", code),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(SHELL_TAKES_AT_MOST):
            said, _ = await shell.communicate()
    except TimeoutError:
        os.killpg(shell.pid, 9)
        await shell.wait()
        pytest.fail(f"{where} did not end within {SHELL_TAKES_AT_MOST} s:\n{code}")
    assert shell.returncode == 0, f"{where} ended with {shell.returncode}:\n{code}\nIt said:\n{said.decode()}"


@pytest.mark.parametrize("page", [*READMES, *SITE], ids=_named)
def test_every_block_says_by_its_language_whether_it_runs(page) -> None:
    assert {block.language for block in blocks_of(page)} <= SHOWN | {"python", "sh"}
    assert [block.code for block in blocks_of(page) if block.language == "sh" and "pip install" in block.code] == []


OTHERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")])


@pytest.mark.parametrize("page", [*OTHERS, *SITE], ids=_named)
def test_every_link_of_a_page_leads_to_a_file(page) -> None:
    """Anchors and what mkdocstrings makes are looked at by `make docs`."""
    prose = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))  # `Queue[Claim](…)` is no link
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{_named(page)} links to {target}"


def _nav(config: Path) -> list[str]:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(value)

    return list(pages(tomllib.loads(config.read_text(encoding="utf-8"))["project"]["nav"]))


@pytest.mark.parametrize(("config", "folder"), [("zensical.toml", ENGLISH), ("zensical.fr.toml", FRENCH)])
def test_every_page_of_the_site_is_in_its_navigation(config, folder) -> None:
    assert sorted(_nav(ROOT / config)) == sorted(str(page.relative_to(folder)) for page in folder.rglob("*.md"))


def test_every_french_page_has_an_english_one_in_the_same_order() -> None:
    english, french = _nav(ROOT / "zensical.toml"), _nav(ROOT / "zensical.fr.toml")
    assert french == [page for page in english if page in french]


def _english(page: Path) -> Path:
    return READMES[0] if page == READMES[1] else ENGLISH / page.relative_to(FRENCH)


@pytest.mark.parametrize("page", [READMES[1], *_french()], ids=_named)
def test_a_french_page_has_the_code_of_its_english_one(page) -> None:
    """In its own words; what one of them only shows, the other may run."""

    def kinds(of: Path) -> list[str]:
        return ["python" if block.language == "py" else block.language for block in blocks_of(of)]

    assert kinds(page) == kinds(_english(page))


@pytest.mark.parametrize("page", [READMES[1], *_french()], ids=_named)
def test_a_french_page_has_the_headings_lists_and_tables_of_its_english_one(page) -> None:
    def shape(of: Path) -> list[str]:
        prose = re.sub(r"^```.*?^```$", "", of.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        return re.findall(r"^(#+ |- |\d+\. |\|(?=.*\|$))", prose, flags=re.MULTILINE)

    assert shape(page) == shape(_english(page))


@pytest.mark.parametrize("page", [READMES[1], *_french()], ids=_named)
def test_a_french_page_keeps_the_typography_of_french(page) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^:::.*$|^\|[-|]+\|$", "", text, flags=re.MULTILINE)
    assert re.findall(r".{0,20}(?:'| [:;!?»]|« |«\xa0{2}).{0,20}", prose) == []


def test_both_sites_are_built_alike() -> None:
    said = {"site_description", "docs_dir", "site_dir", "copyright", "nav", "theme", "extra"}  # in its own language

    def rest(config: str) -> dict[str, Any]:
        project = tomllib.loads((ROOT / config).read_text(encoding="utf-8"))["project"]
        return {"features": project["theme"]["features"], **{key: project[key] for key in project if key not in said}}

    assert rest("zensical.toml") == rest("zensical.fr.toml")


@pytest.mark.parametrize("folder", [ENGLISH, FRENCH], ids=_named)
def test_the_reference_names_every_command_rule_term_and_error(folder: Path) -> None:
    def said(page: str) -> str:
        return (folder / "reference" / page).read_text(encoding="utf-8")

    rules = [field.name for field in dataclasses.fields(filao.Queue) if field.name != "name"]
    terms = list(inspect.signature(filao.Broker.send_to_queue).parameters)[3:]
    errors = [
        name for name, value in vars(filao).items() if isinstance(value, type) and issubclass(value, filao.FilaoError)
    ]
    assert [name for name in commands.commands if f"`filao {name}" not in said("command-line.md")] == []
    assert [name for name in rules + terms if f"`{name}`" not in said("rules.md")] == []
    assert [name for name in errors if name not in said("errors.md")] == []
    made = [name for name in filao.__all__ if inspect.isroutine(it := getattr(filao, name)) or inspect.isclass(it)]
    public = [name for name in made if name not in errors]
    assert [name for name in public if f"::: filao.{name}\n" not in said("api.md")] == []


def test_the_diagram_is_the_one_of_the_package() -> None:
    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines()]

    diagram = re.search(r"```(?:text)?\n( send.*?)```", READMES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert diagram is not None
    assert set(lines(diagram[1])) <= set(lines(filao.__doc__ or ""))
