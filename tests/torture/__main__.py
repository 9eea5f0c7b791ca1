"""Kill producers and consumers at random moments, start them again, and let the checker judge what they wrote down."""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.torture import actors, checker
from tests.torture.history import History, Record, now, read

CAST = ("producer-1", "producer-2", "consumer-1", "consumer-2", "consumer-3")
PAUSE = 0.15  # seconds from one kill to the next, on average
STOPPED = 0.1  # of the consumers are stopped instead of killed, and go on after their leases ran out
STOPPED_MAX = 1.5  # seconds: longer than a lease


@dataclass
class Stage:
    """The processes that play, and the one that kills them."""

    db: Path | str
    histories: Path
    seed: int
    history: History = field(init=False)
    playing: dict[int, actors.Scene] = field(default_factory=dict)
    stopped: dict[int, float] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histories.mkdir()
        self.history = History(self.histories / "parent")

    def enter(self, scene: actors.Scene) -> None:
        """Fork an actor."""
        pid = os.fork()
        if pid == 0:
            _be(scene)
        self.playing[pid] = scene

    def kill(self, pid: int) -> actors.Scene:
        """Kill an actor at once, and wait until it is gone."""
        scene = self.playing.pop(pid)
        self.stopped.pop(pid, None)
        began = now()
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        died = Record(process=scene.process, call="live", outcome="killed", began=began, ended=now())
        self.history.write(died)
        if not os.WIFSIGNALED(status):
            self.complaints.append(f"{scene.process} ended by itself, with status {os.waitstatus_to_exitcode(status)}")
        return scene

    def stop(self, pid: int, seconds: float) -> None:
        """Let an actor stand still for a while."""
        os.kill(pid, signal.SIGSTOP)
        self.stopped[pid] = now() + seconds

    def go_on(self) -> None:
        """Wake those who have stood still for long enough."""
        for pid, until in list(self.stopped.items()):
            if until < now():
                os.kill(pid, signal.SIGCONT)
                del self.stopped[pid]


def _be(scene: actors.Scene) -> None:
    """In the child: play, and never return."""
    try:
        actors.play(scene)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def torture(
    folder: Path, db: Path | str, *, kills: int, pause: float, seed: int
) -> tuple[list[Record], checker.Left, list[str]]:
    """Return the history, what was left, and what was broken."""
    asyncio.run(actors.prepare(db))
    stage = Stage(db, folder / "histories", seed)
    chance = Random(seed)
    for name in CAST:
        stage.enter(actors.Scene(stage.db, stage.histories, name, 0, seed))
    for _ in range(kills):
        time.sleep(chance.uniform(0, 2 * pause))
        stage.go_on()
        pid = chance.choice(list(stage.playing))
        while chance.random() < STOPPED and stage.playing[pid].name.startswith("consumer"):
            stage.stop(pid, chance.uniform(0, STOPPED_MAX))
            pid = chance.choice(list(stage.playing))
        killed = stage.kill(pid)
        stage.enter(replace(killed, life=killed.life + 1))
    for pid in list(stage.playing):
        stage.kill(pid)
    left = asyncio.run(actors.drain(actors.Scene(stage.db, stage.histories, "drain")))
    history = [record for path in sorted(stage.histories.iterdir()) for record in read(path)]
    return history, left, stage.complaints + checker.check(history, left)


def report(history: list[Record], left: checker.Left, broken: list[str]) -> None:
    """Print the ledger, in the words of Jepsen's queue checker."""
    story = checker.Story(history)
    outcomes = Counter(call.outcome for call in story.sends)
    causes = Counter(cause or "NO CAUSE" for cause, _ in checker.causes(story))
    print(f"{len(story.killed):7,} processes killed")
    print(f"{len(story.sends):7,} sends: {', '.join(f'{count:,} {outcome}' for outcome, count in outcomes.items())}")
    print(f"{sum(map(len, story.deliveries.values())):7,} deliveries of {len(story.deliveries):,} messages")
    print(f"{causes.total():7,} again: {', '.join(f'{count:,} {cause}' for cause, count in causes.items())}")
    print(
        f"{checker.unseen_room(story):7,} deliveries at most were cut off by a kill before they could be written down"
    )
    print(f"{len(left.dead):7,} dead letters, {len(left.effects):,} effects of transactions")
    print(f"{len(broken):7,} promises broken")
    for line in broken[:50]:
        print(f"        {line}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, help=f"over which the kills are spread ({PAUSE} for each)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--url", help="of an empty database; default: a file of its own")
    arguments = parser.parse_args()
    pause = PAUSE if arguments.seconds is None else arguments.seconds / arguments.kills
    folder = Path(tempfile.mkdtemp(prefix="filao-torture-"))
    print(f"{arguments.kills} kills, seed {arguments.seed}, in {folder}", flush=True)
    history, left, broken = torture(
        folder, arguments.url or folder / "claims.db", kills=arguments.kills, pause=pause, seed=arguments.seed
    )
    report(history, left, broken)
    if broken:
        return 1  # the folder is kept
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
