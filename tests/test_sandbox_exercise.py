"""Step 11: what is said of a learner's code, good, bad, endless or ending itself; and that nothing of it is left."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from filao.sandbox import exercise
from filao.sandbox.crew import is_there
from filao.sandbox.exercise import Exercise
from filao.sandbox.words import program
from tests.support.learner import until_soon

pytestmark = pytest.mark.anyio

SKELETON = program("my_consumer")
TRANSACTION = """\
        try:
            await evaluate_claim(message)
            async with message.transaction() as tx:
                await pay(tx, message)
        except Exception as error:
            await message.nack(reason=error)
"""
ACK = """\
        try:
            await evaluate_claim(message)
            async with broker.transaction() as tx:
                await pay(tx, message)
            await message.ack()
        except Exception as error:
            await message.nack(reason=error)
"""
UNCAUGHT = """\
        await evaluate_claim(message)
        async with message.transaction() as tx:
            await pay(tx, message)
"""
IDEMPOTENT = ACK.replace(
    "await pay(tx, message)",
    'paid = await tx.execute("SELECT 1 FROM payment WHERE claim = ?", (message["claim_id"],))\n'
    "                if not paid:\n                    await pay(tx, message)",
)


def code(body: str) -> str:
    head, _, rest = SKELETON.partition("        # 1.")
    return f"{head}{body}\n\n# What follows{rest.partition('# What follows')[2]}"


@pytest.fixture
async def checked(tmp_path) -> AsyncGenerator[Exercise]:
    found = Exercise(tmp_path / "exercise")
    yield found
    await found.stop()
    assert processes(tmp_path) == []
    assert list((tmp_path / "exercise").glob("run-*")) == []


@pytest.fixture
def only(monkeypatch) -> Callable[..., None]:
    """Let only some checks be made: the others would cost seconds, and say nothing of what is tested."""
    return lambda *checks: monkeypatch.setattr(exercise, "CHECKS", checks)


def processes(folder: Path) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and bytes(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def results(found: Exercise, text: str) -> dict[str, tuple[str, str]]:
    await found.start(text)
    await until_soon(lambda: not found.is_running)
    return {check: (result.state, result.key) for check, result in found.results.items()}


async def test_the_skeleton_is_red_everywhere_with_reasons(checked) -> None:
    assert await results(checked, SKELETON) == {
        "after_work": ("red", "too_early"),
        "survives": ("red", "lost_by_kill"),
        "nacks": ("red", "acked_failed"),
        "nothing_lost": ("red", "lost_some"),
        "once": ("red", "acked_first"),
    }


async def test_good_code_is_green_everywhere(checked) -> None:
    assert {state for state, _ in (await results(checked, code(IDEMPOTENT))).values()} == {
        "green"
    }  # the page has others


async def test_a_kill_finds_code_at_work_however_it_reads_the_claim(checked, only) -> None:
    only("survives")
    text = code(TRANSACTION).replace('sleep(message["effort"])', 'sleep(message.body.get("effort"))')
    assert await results(checked, text) == {"survives": ("green", "ok_survives")}
    assert checked.results["survives"].values["attempt"] == 2


async def test_code_that_is_not_idempotent_pays_twice(checked, only) -> None:
    only("after_work", "once")
    assert await results(checked, code(ACK)) == {
        "after_work": ("green", "ok_after_work"),
        "once": ("red", "paid_twice"),
    }


async def test_an_error_that_is_not_caught_is_told_with_its_line(checked, only) -> None:
    only("nacks")
    found = await results(checked, code(UNCAUGHT))
    assert found["nacks"] == ("red", "raised")
    told = checked.results["nacks"].values
    assert "policy 0 is not in the register" in str(told["error"])
    assert "raise ValueError" in code(UNCAUGHT).splitlines()[int(told["line"]) - 1]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (SKELETON.replace("while True:", "while True"), "syntax"),
        ("x = '\0'", "no_python"),
        ("(" * 3000, "syntax"),
        ("import sys; sys.exit(3)", "exited"),
        ("print('hello')", "ended"),
        ("raise KeyboardInterrupt", "raised"),
        ("import os; os._exit(1)", "vanished"),
        ("input('what now?')", "raised"),
        ("bytearray(3 * 1024**3)", "raised"),
        ("#" * (exercise.CODE_MAX + 1), "too_long"),
    ],
    ids=["syntax", "null", "nesting", "exit", "end", "interrupt", "hard exit", "input", "memory", "too long"],
)
async def test_what_is_no_consumer_is_told_and_not_suffered(checked, only, text, key) -> None:
    only("after_work")
    found = await results(checked, text)
    assert found["after_work"] == ("red", key)


async def test_code_that_is_no_python_is_told_so_once(checked) -> None:
    found = await results(checked, SKELETON.replace("while True:", "while True"))
    assert [key for _, key in found.values()] == ["syntax", *["not_run"] * 4]


HIDES = """
import os, subprocess, sys
says = "import os, pathlib, time; pathlib.Path({folder!r}, str(os.getpid())).touch(); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", says], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve(sys.executable, [sys.executable, "-c", says], {{}})
    os._exit(0)
while True:
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only its process group is known")
async def test_what_the_code_has_started_ends_with_it_wherever_it_hides(checked, tmp_path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    await checked.start(HIDES.format(folder=str(folder)))
    await until_soon(lambda: len(list(folder.iterdir())) == 2)
    await checked.cancel()
    assert [path.name for path in folder.iterdir() if is_there(int(path.name))] == []


async def test_code_that_starts_ever_more_processes_is_stopped_and_told(checked, only, monkeypatch) -> None:
    only("after_work")
    monkeypatch.setattr(exercise, "CROWD", 4)
    monkeypatch.setattr(exercise, "COUNT_EVERY", 0.05)
    text = "import os, time\nwhile os.fork():\n    time.sleep(0.05)\ntime.sleep(600)\n"
    assert await results(checked, text) == {"after_work": ("red", "crowd")}


async def test_what_is_checked_again_and_again_at_once_is_checked_once(checked) -> None:
    await asyncio.gather(*(checked.start("import time\ntime.sleep(600)\n") for _ in range(3)))
    assert checked.started == 3  # and when it is stopped, nothing is left


async def test_the_code_runs_where_nothing_of_ours_lies(checked, only) -> None:
    only("after_work")
    await results(checked, "import os\nprint(os.listdir())\n")
    assert checked.output == "[]\n"


async def test_code_that_cannot_be_stored_is_told(checked, tmp_path) -> None:
    (tmp_path / "exercise").mkdir()
    (tmp_path / "exercise" / "my_consumer.py").mkdir()
    assert (await results(checked, SKELETON))["once"] == ("red", "storage")


async def test_an_endless_loop_is_told(checked, monkeypatch) -> None:
    monkeypatch.setattr(exercise, "STUCK_AFTER", 5.0)
    monkeypatch.setattr(exercise, "BUSY_AFTER", 0.6)
    found = await results(checked, "while True:\n    pass\n")
    assert found["after_work"] == ("red", "loops")
    assert found["once"] == ("red", "not_run")


async def test_code_that_waits_for_nothing_is_told(checked, monkeypatch) -> None:
    monkeypatch.setattr(exercise, "STUCK_AFTER", 1.0)
    found = await results(checked, "import time\nwhile True:\n    time.sleep(1)\n")
    assert found["after_work"] == ("red", "stuck")


async def test_what_is_stopped_says_so_and_leaves_no_process(checked, tmp_path) -> None:
    await checked.start("while True:\n    pass\n")
    await until_soon(lambda: processes(tmp_path))
    await checked.cancel()
    assert processes(tmp_path) == []
    assert checked.results["after_work"].key == "stopped"


async def test_what_the_processes_print_is_kept_within_bounds(checked, only) -> None:
    only("after_work")
    await results(checked, "print('x' * 100_000)\nprint('the end')\n")
    assert checked.output.endswith("the end\n")
    assert len(checked.output) <= exercise.SHOWN_MAX


@pytest.mark.parametrize(
    "text",
    ["while True:\n    pass\n", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')\n"],
    ids=["loop", "no thread gets a turn"],
)
async def test_a_process_of_the_learners_ends_with_the_sandbox(tmp_path, text) -> None:
    text = f"print('begun', flush=True)\n{text}"
    starter = f"""
import asyncio
from pathlib import Path
from filao.sandbox.exercise import Exercise
async def main():
    found = Exercise(Path({str(tmp_path)!r}) / "exercise")
    await found.start({text!r})
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", starter], env=os.environ) as parent:
        await until_soon(lambda: any(path.stat().st_size for path in tmp_path.glob("exercise/run-*/*.out")))
        parent.kill()
    await until_soon(lambda: processes(tmp_path) == [])
