"""Kill, stop and end processes at random moments, start them again, and let the checker judge what they wrote down.

python -m tests.torture --minutes 10 --engine postgresql
"""

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from tests.support.servers import postgres_server
from tests.torture import actors, checker, workers
from tests.torture.history import History, Outcome, Record, now, read
from tests.torture.scene import KEPT, Scene

PAUSE = 0.3  # seconds from one deed to the next, on average
STOPPED = 0.25  # of the deeds: a process stands still, and goes on after its leases ran out
ENDED = 0.2  # of the others: it is told to end by SIGTERM; the rest are killed
STOPPED_MAX = 2.5  # seconds: longer than a lease
ENDS_WITHIN = 40.0  # seconds that a process may take to end: more than the 30 of any wait
SPARED = ("auditor",)  # who is neither stopped nor ended before all others are


@dataclass(frozen=True)
class Verdict:
    """How it ended."""

    history: list[Record]
    left: checker.Left
    broken: list[str]


@dataclass
class Stage:
    """The processes that play, and the one that kills them."""

    db: Path | str
    histories: Path
    seed: int
    history: History = field(init=False)
    playing: dict[int, Scene] = field(default_factory=dict)
    stopped: dict[int, float] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histories.mkdir()
        self.history = History(self.histories / "parent")

    def enter(self, scene: Scene) -> None:
        """Fork an actor."""
        pid = os.fork()
        if pid == 0:
            _be(scene)
        self.playing[pid] = scene

    def kill(self, pid: int) -> Scene:
        """Kill an actor at once, and wait until it is gone."""
        began = now()
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            self._complain(pid, f"ended by itself, with status {os.waitstatus_to_exitcode(status)}")
        return self._leave(pid, "killed", began)

    def end(self, pid: int) -> Scene:
        """Tell an actor to end, and wait until it has."""
        self.wake(pid)
        began = now()
        os.kill(pid, signal.SIGTERM)
        while True:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                break
            self.go_on()
            if now() - began > ENDS_WITHIN:
                self._complain(pid, f"did not end within {ENDS_WITHIN:g} s of SIGTERM")
                return self.kill(pid)
            time.sleep(0.01)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM:  # before it had begun to listen
            return self._leave(pid, "killed", began)
        if status:
            self._complain(pid, f"was told to end, and ended with {os.waitstatus_to_exitcode(status)}")
        return self._leave(pid, "ended", began)

    def _leave(self, pid: int, outcome: Outcome, began: float) -> Scene:
        scene = self.playing.pop(pid)
        self.stopped.pop(pid, None)
        self.history.write(Record(process=scene.process, call="live", outcome=outcome, began=began, ended=now()))
        return scene

    def _complain(self, pid: int, what: str) -> None:
        self.complaints.append(f"{self.playing[pid].process} {what}")

    def stop(self, pid: int, seconds: float) -> None:
        """Let an actor stand still for a while."""
        scene = self.playing[pid]
        hidden = workers.HIDDEN_MAX if actors.part_of(scene.name) == "worker" else 0
        self.history.write(Record(process=scene.process, call="stop", began=now(), limit=hidden))
        os.kill(pid, signal.SIGSTOP)
        self.stopped[pid] = now() + seconds

    def wake(self, pid: int) -> None:
        """Let an actor go on that stands still."""
        if self.stopped.pop(pid, None) is not None:
            os.kill(pid, signal.SIGCONT)

    def go_on(self) -> None:
        """Wake those who have stood still for long enough."""
        for pid, until in list(self.stopped.items()):
            if until < now():
                self.wake(pid)

    def victim(self, chance: Random) -> int:
        """Choose who is next."""
        return chance.choice([pid for pid, scene in self.playing.items() if actors.part_of(scene.name) not in SPARED])


def _be(scene: Scene) -> None:
    """In the child: play, and never return. What a worker logs of handlers that fail on purpose is of no interest."""
    logging.disable(logging.WARNING)
    try:
        actors.play(scene)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def torture(folder: Path, db: Path | str, *, seconds: float, pause: float, seed: int) -> Verdict:
    """Return the history, what was left, and what was broken."""
    asyncio.run(actors.prepare(db))
    stage = Stage(db, folder / "histories", seed)
    chance = Random(seed)
    for name in actors.CAST:
        stage.enter(Scene(stage.db, stage.histories, name, 0, seed))
    over = now() + seconds
    while now() < over and not stage.complaints:
        time.sleep(chance.uniform(0, 2 * pause))
        stage.go_on()
        pid = stage.victim(chance)
        if chance.random() < STOPPED:
            stage.stop(pid, chance.uniform(0, STOPPED_MAX))
            continue
        gone = stage.end(pid) if chance.random() < ENDED else stage.kill(pid)
        stage.enter(replace(gone, life=gone.life + 1))
    for pid in sorted(stage.playing, key=lambda pid: stage.playing[pid].name in SPARED):
        stage.kill(pid)
    left = asyncio.run(actors.drain(Scene(stage.db, stage.histories, "drain")))
    history = [record for path in sorted(stage.histories.iterdir()) for record in read(path)]
    return Verdict(history, left, stage.complaints + checker.check(history, left, KEPT))


def report(verdict: Verdict) -> None:
    """Print the ledger, in the words of Jepsen's queue checker."""
    story = checker.Story(verdict.history, KEPT)
    outcomes = Counter(call.outcome for call in story.sends)
    causes = Counter(cause or "NO CAUSE" for cause, _ in checker.causes(story))
    deeds = Counter(call.begin.call for call in story.did("pause", "purge", "cancel", "redrive", "delete"))
    settles = Counter(call.begin.call for call in story.did(*checker.SETTLES))
    lines = {
        "SIGKILLs": len(story.killed) - len(story.ended),
        "SIGTERMs": len(story.ended),
        "SIGSTOPs": len(story.stops),
        f"sends: {_listed(outcomes)}": outcomes.total(),
        f"deliveries of {len(story.deliveries):,} messages": sum(map(len, story.deliveries.values())),
        f"settles: {_listed(settles)}": settles.total(),
        f"deliveries again: {_listed(causes)}": causes.total(),
        f"of the operator's: {_listed(deeds)}": deeds.total(),
        "audits: the counters compared with what is there": len(story.did("audit")),
        "dead letters in the end": len(verdict.left.dead),
        "effects of transactions": len(verdict.left.effects),
        "promises broken": len(verdict.broken),
    }
    for what, count in lines.items():
        print(f"{count:9,} {what}")
    for line in verdict.broken[:50]:
        print(f"          {line}")
    row = (
        *(f"{len(story.killed) - len(story.ended):,}", f"{len(story.ended):,}", f"{len(story.stops):,}"),
        *(f"{outcomes['done']:,}", f"{sum(map(len, story.deliveries.values())):,}", f"{deeds.total():,}"),
        *(f"{len(story.did('audit')):,}", len(verdict.broken)),
    )
    print("| SIGKILLs | SIGTERMs | SIGSTOPs | confirmed sends | deliveries | operator | audits | promises broken |")
    print("|", " | ".join(map(str, row)), "|")


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))


@contextmanager
def storage(arguments: argparse.Namespace, folder: Path) -> Iterator[Path | str]:
    """Give the database to play with: a server of our own for PostgreSQL, unless there is one."""
    if arguments.url:
        yield arguments.url
    elif arguments.engine == "sqlite":
        yield folder / "claims.db"
    else:
        folder.chmod(0o755)  # for the user that the server runs as
        with postgres_server(folder / "server") as server:
            yield server.create("torture")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--engine", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds from one kill, stop or end to the next")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--url", help="of an empty database; default: one of its own")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="filao-torture-"))
    began = now()
    print(f"{arguments.minutes:g} minutes, seed {arguments.seed}, in {folder}", flush=True)
    with storage(arguments, folder) as db:
        seconds = 60 * arguments.minutes
        verdict = torture(folder, db, seconds=seconds, pause=arguments.pause, seed=arguments.seed)
    report(verdict)
    print(f"{now() - began:9,.0f} seconds")
    if verdict.broken:
        return 1  # the folder is kept
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
