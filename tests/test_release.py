"""What a release needs: builds that can be repeated, a complete archive of the source, one version."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import filao

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".matrix", ".*_cache", "__pycache__", "dist", "build", "site", ".hypothesis"
)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Build twice, in folders of different names, and return the files of both."""
    built: list[dict[str, bytes]] = []
    for name in ("one", "other"):
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(ROOT, folder, ignore=NOT_SOURCE, symlinks=True)
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."],
            cwd=folder,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
            check=True,
            capture_output=True,
        )
        built.append({path.name: path.read_bytes() for path in (folder / "dist").iterdir()})
    return built


def test_two_builds_are_the_same_byte_for_byte(builds) -> None:
    assert sorted(name.rpartition(".")[2] for name in builds[0]) == ["gz", "whl"]
    assert builds[0] == builds[1]


def test_the_archive_of_the_source_can_test_itself(builds, tmp_path) -> None:
    (name,) = [name for name in builds[0] if name.endswith(".gz")]
    (tmp_path / name).write_bytes(builds[0][name])
    with tarfile.open(tmp_path / name) as archive:
        held = {member.partition("/")[2] for member in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a checkout: nothing tells what belongs to it")
    wanted = {path for path in tracked.stdout.splitlines() if not path.startswith((".github/", ".gitignore"))}
    assert wanted - held == set()


def test_the_newest_release_of_the_changelog_is_this_version_and_says_where_it_lives() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changelog, flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", filao.__version__)
    assert not released or released[0] == filao.__version__
    assert "## [Unreleased]" in changelog
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not released or {"Homepage", "Documentation", "Source", "Changelog", "Issues"} <= project["urls"].keys()
