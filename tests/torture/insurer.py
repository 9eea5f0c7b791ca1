"""The insurer under fire: claims go through its portal while portal, relay and workers are killed, under each
guarantee.

The client repeats a request until it is answered, with the same reference, and writes down what was confirmed. The
checker reads only that log and the insurer's own database: it knows nothing of queues.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import filao.sync
from filao.sandbox.claims import claims_of

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT.parent / "shared" / "data" / "freMTPL2sev.csv"
GUARANTEES = ("at-most-once", "at-least-once", "exactly-once")
PAUSE = 0.35  # seconds from one kill to the next, on average
CLIENTS = 16
PATIENCE = 120.0  # seconds for the work that is left after the last kill


@dataclass(frozen=True, slots=True)
class Submitted:
    """A claim as the client sends it."""

    reference: str
    policy: int
    amount: int


@dataclass
class Company:
    """The insurer's processes."""

    folder: Path
    guarantee: str
    port: int
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)

    def start(self, name: str) -> None:
        """Start one of them."""
        commands = {
            "portal": ["uvicorn", "examples.insurance.portal:app", "--port", str(self.port), "--log-level", "error"],
            "relay": ["examples.insurance.relay"],
        }
        command = commands.get(name, ["filao", "work", "examples.insurance.claims:worker"])
        environment = os.environ | {"INSURANCE_FOLDER": str(self.folder), "INSURANCE_GUARANTEE": self.guarantee}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        """Kill one at once, and start it again."""
        self.processes[name].kill()
        self.processes[name].wait()
        self.kills[name.rstrip("-0123456789")] += 1
        self.start(name)

    def stop(self) -> None:
        """End them all."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


class Clients:
    """Customers who repeat what was not answered, and write down what was. They go on as they are allowed to."""

    def __init__(self, port: int, claims: Sequence[Submitted], log: Path) -> None:
        self._port = port
        self._claims = iter(claims)
        self._log = log.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._allowed = threading.Semaphore(0)
        self._given_up = threading.Event()
        self._threads = [threading.Thread(target=self._visit, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def allow(self, count: int) -> None:
        """Let so many more claims be sent."""
        self._allowed.release(count)

    def are_done(self) -> bool:
        """Return whether every claim was confirmed."""
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Send them home."""
        self._given_up.set()
        self._allowed.release(CLIENTS)
        for thread in self._threads:
            thread.join()
        self._log.close()

    def _visit(self) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection:
            self._work(connection)

    def _work(self, connection: http.client.HTTPConnection) -> None:
        while not self._given_up.is_set():
            self._allowed.acquire()
            with self._lock:
                claim = next(self._claims, None)
            if claim is None:
                self._allowed.release(CLIENTS)
                return
            while not self._given_up.is_set() and not _post(connection, claim):
                connection.close()
                time.sleep(0.05)  # between two tries of a customer's
            if self._given_up.is_set():
                return
            with self._lock:
                self._log.write(f"{claim.reference} {claim.amount}\n")
                self._log.flush()


def _post(connection: http.client.HTTPConnection, claim: Submitted) -> bool:
    body = json.dumps({"reference": claim.reference, "policy": claim.policy, "type": "motor", "amount": claim.amount})
    try:
        connection.request("POST", "/claims", body)
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return False
    return answer.status == 202


def play(folder: Path, guarantee: str, claims: Sequence[Submitted], kills: int, chance: Random) -> Company:
    """Submit the claims while so many processes are killed, and wait until nothing is left to do."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        company = Company(folder, guarantee, probe.getsockname()[1])
    for name in ("portal", "relay", "worker-1", "worker-2", "worker-3"):
        company.start(name)
    clients = Clients(company.port, claims, folder / "confirmed")
    try:
        share = -(-len(claims) // max(kills, 1))
        for _ in range(kills):
            clients.allow(share)
            time.sleep(chance.expovariate(1 / PAUSE))
            company.kill(chance.choice(list(company.processes)))
        clients.allow(len(claims))
        deadline = time.monotonic() + PATIENCE
        while not (clients.are_done() and _is_idle(folder)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{guarantee}: there is work left after {PATIENCE:g} s; see {folder}")
            time.sleep(0.1)
    finally:
        clients.close()
        company.stop()
    return company


def _is_idle(folder: Path) -> bool:
    with closing(sqlite3.connect(folder / "business.db")) as business:
        if business.execute("SELECT count(*) FROM filao_outbox").fetchone()[0]:
            return False
    with filao.sync.connect(folder / "queues.db") as broker:
        stats = broker.stats("claims.processing")
        return not stats.ready + stats.delayed + stats.leased + stats.blocked


# --- the checker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the books say."""

    confirmed: int
    paid: int
    lost: int
    doubled: int
    total: int
    complaints: list[str]


def check(folder: Path, guarantee: str, claims: Sequence[Submitted]) -> Verdict:
    """Compare what was confirmed with what was paid."""
    confirmed = dict(line.split() for line in (folder / "confirmed").read_text(encoding="utf-8").splitlines())
    with closing(sqlite3.connect(folder / "business.db")) as business:
        stored = dict(business.execute("SELECT reference, amount FROM claim"))
        paid = Counter(
            reference
            for (reference,) in business.execute("SELECT reference FROM payment JOIN claim ON claim.id = payment.claim")
        )
        total = business.execute("SELECT coalesce(sum(amount), 0) FROM payment").fetchone()[0]
    lost = [reference for reference in confirmed if not paid[reference]]
    doubled = [reference for reference, times in paid.items() if times > 1]
    verdict = Verdict(len(confirmed), len(paid), len(lost), len(doubled), total, [])
    verdict.complaints.extend(_complaints(guarantee, lost, doubled))
    if missing := set(confirmed) - set(stored):
        verdict.complaints.append(f"{len(missing)} confirmed claims are not in the database")
    if len(confirmed) < len(claims):
        verdict.complaints.append(f"{len(claims) - len(confirmed)} claims were never confirmed")
    if guarantee == "exactly-once" and total != sum(claim.amount for claim in claims):
        verdict.complaints.append(f"paid {total} cents, of {sum(claim.amount for claim in claims)}")
    return verdict


def _complaints(guarantee: str, lost: Sequence[str], doubled: Sequence[str]) -> Iterator[str]:
    if lost and guarantee != "at-most-once":
        yield f"{len(lost)} confirmed claims were never paid, such as {lost[0]}"
    if doubled and guarantee != "at-least-once":
        yield f"{len(doubled)} claims were paid more than once, such as {doubled[0]}"


def real_claims(limit: int | None) -> list[Submitted]:
    """Return the claims of the file, where there is one; else made-up ones."""
    if not CLAIMS.exists():
        return made_up(limit or 26_639)
    with CLAIMS.open("rb") as file:
        claims = claims_of(str(CLAIMS), file, limit)
    return [Submitted(f"c{number}", claim.policy, claim.amount) for number, claim in enumerate(claims)]


def made_up(count: int) -> list[Submitted]:
    """Make up claims, always the same ones: half of them are above 1,400 euros, a few far above."""
    chance = Random(7)
    return [
        Submitted(f"c{number}", chance.randrange(1_000_000, 10_000_000), round(140_000 * chance.lognormvariate(0, 0.8)))
        for number in range(count)
    ]


def prove(folder: Path, guarantee: str, claims: Sequence[Submitted], kills: int, seed: int) -> bool:
    """Play it under one guarantee, print what the books say, and return whether it was kept."""
    began = time.monotonic()
    company = play(folder, guarantee, claims, kills, Random(seed))
    verdict = check(folder, guarantee, claims)
    killed = ", ".join(f"{count} {name}" for name, count in sorted(company.kills.items()))
    print(f"{guarantee}: {company.kills.total()} kills ({killed}), {time.monotonic() - began:.0f} s")
    print(
        f"    {verdict.confirmed:,} confirmed, {verdict.paid:,} paid, {verdict.lost:,} "
        f"lost, {verdict.doubled:,} doubled"
    )
    print(
        f"    {verdict.total / 100:,.2f} paid in all", *verdict.complaints, sep="\n    ! " if verdict.complaints else ""
    )
    return not verdict.complaints


def main() -> int:
    """Prove each guarantee; exit with 1 when one was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.insurer", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="under each guarantee")
    parser.add_argument("--limit", type=int, help="how many claims; default: all")
    parser.add_argument("--guarantee", choices=GUARANTEES, nargs="+", default=list(GUARANTEES))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    options = parser.parse_args()
    claims = real_claims(options.limit)
    folder = Path(tempfile.mkdtemp(prefix="filao-insurer-"))
    print(f"{len(claims):,} claims, seed {options.seed}, in {folder}", flush=True)
    kept = [prove(folder / one, one, claims, options.kills, options.seed) for one in options.guarantee]
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
