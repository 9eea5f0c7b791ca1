"""Turns the figures into tables, bars and a plot."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import EMBEDDED, SERVERS


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: what was wanted, and what was measured."""

    text: str
    found: float
    wanted: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    def __str__(self) -> str:
        verdict = "PASS" if self.holds else "MISS"
        return f"{verdict}  {self.text}: {self.found:.4g} (wanted {'<=' if self.at_most else '>='} {self.wanted:.4g})"


def tables(found: dict[str, Any]) -> list[str]:
    """Return the rates as a table, and everything else line by line."""
    rates = {
        "send-one, 64 producers": found.get("sending", {}).get("together"),
        "send-one, a lone producer": found.get("sending", {}).get("alone"),
        "drain, one consumer": found.get("draining", {}).get("drain"),
        "one producer, three consumers": found.get("competing", {}).get("rate"),
        "jobs enqueued": found.get("working", {}).get("enqueue"),
        "jobs processed by two processes": found.get("working", {}).get("process"),
        "PostgreSQL: send-one, 64 producers": found.get("postgresql", {}).get("send"),
        "PostgreSQL: drain, one consumer process": found.get("postgresql", {}).get("drain"),
        "RabbitMQ: send-one, 64 producers": found.get("rabbitmq", {}).get("send"),
        "RabbitMQ: drain, one consumer process": found.get("rabbitmq", {}).get("drain"),
    }
    lines: list[str] = []
    for title, figures in rates.items():
        if figures:
            lines += ["", f"{title} (messages a second; of Filao's)"]
            ours = figures["Filao"]
            ranked = sorted(figures.items(), key=lambda one: -one[1])
            lines += [f"  {name:15} {figure:>10,.0f}   {figure / ours:7.3f}" for name, figure in ranked]
    for measure in ("lone", "views", "fairness", "waking", "depth", "takeover", "space", "sandbox"):
        if measure in found:
            lines += ["", measure, *(f"  {name}: {value}" for name, value in found[measure].items())]
    return lines


def bars(found: dict[str, Any]) -> list[Bar]:
    """Return the bars that can be judged from what was found."""
    judged: list[Bar] = []
    if "sending" in found:
        judged += _sending(found["sending"])
    if "lone" in found:
        judged += _lone(found["lone"])
    if "draining" in found:
        judged += _draining(found["draining"]["drain"])
    if "competing" in found:
        judged += _competing(found["competing"])
    if "fairness" in found:
        ours = found["fairness"]["Filao"]
        judged.append(Bar("eight writers, Jain's index", ours["jain"], 0.98))
        judged.append(Bar("eight writers, longest wait in ms", ours["longest"], 100, at_most=True))
    if "waking" in found:
        judged += _waking(found["waking"])
    if "depth" in found:
        judged += _depth(found["depth"])
    if "takeover" in found:
        judged.append(Bar("takeover after SIGKILL in ms", found["takeover"]["milliseconds"], 250, at_most=True))
    if "space" in found:
        judged += _space(found["space"])
    if "working" in found:
        judged += _working(found["working"])
    if "views" in found:
        judged += _views(found["views"])
    if "postgresql" in found:
        judged += _postgresql(found["postgresql"])
    if "old-transactions" in found:
        judged += _old_transactions(found["old-transactions"]["Filao"])
    if "idle" in found:
        few, many = found["idle"]["8"], found["idle"]["200"]
        judged.append(Bar("PostgreSQL: 200 idle consumers, cores of the server", many["core"], 0.03, at_most=True))
        judged.append(
            Bar("PostgreSQL: wait with 200 waiting against 8", many["median"] / few["median"], 1.5, at_most=True)
        )
    if "rabbitmq" in found:
        judged += [
            Bar(f"RabbitMQ: {what}-one against aio-pika by hand", rates["Filao"] / rates["aio-pika"], 0.9)
            for what, rates in found["rabbitmq"].items()
        ]
    if "sandbox" in found:
        judged += _sandbox(found["sandbox"])
    return judged


def _best(figures: dict[str, float], names: Any) -> float:
    return max((figures[name] for name in names if name in figures), default=float("nan"))


def _sending(sending: dict[str, Any]) -> list[Bar]:
    together, alone = sending["together"], sending["alone"]
    ours = together["Filao"]
    embedded = max(_best(together, EMBEDDED), _best(alone, EMBEDDED))
    return [
        Bar("send-one against the best embedded peer", ours / embedded, 8),
        Bar("send-one against Redis", ours / _best(together, ["Redis"]), 3.5),
        Bar("send-one of raw SQLite", ours / together["raw SQLite"], 0.25),
        Bar("lone producer against the best embedded peer", alone["Filao"] / _best(alone, EMBEDDED), 0.7),
    ]


def _lone(lone: dict[str, float]) -> list[Bar]:
    raw, send, alone = lone["raw commit"], lone["filao.sync, send"], lone["filao, send"]
    judged = [
        Bar("a lone send of the blocking twin, microseconds over a raw commit", send - raw, 60, at_most=True),
        Bar("a lone async send, microseconds over a raw commit", alone - raw, 110, at_most=True),
    ]
    if "huey, enqueue" in lone:
        judged += [
            Bar("a lone send of the blocking twin against huey", lone["huey, enqueue"] / send, 0.8),
            Bar("a lone async send against huey", lone["huey, enqueue"] / alone, 0.65),
            Bar(
                "a lone receive and ack of the blocking twin against huey's pop",
                lone["huey, dequeue"] / lone["filao.sync, receive and ack"],
                0.6,
            ),
        ]
    return judged


def _draining(drain: dict[str, float]) -> list[Bar]:
    ours = drain["Filao"]
    return [
        Bar("drain against the best embedded peer", ours / _best(drain, EMBEDDED), 4),
        Bar("drain against RabbitMQ", ours / _best(drain, ["RabbitMQ"]), 3),
        Bar("drain of raw SQLite", ours / drain["raw SQLite"], 0.22),
    ]


def _competing(competing: dict[str, Any]) -> list[Bar]:
    rate, runs = competing["rate"], competing["runs"]["Filao"]
    uneven = statistics.median(max(abs(share - 1 / 3) for share in run["shares"]) for run in runs)
    wrong = sum(run["lost"] + run["doubled"] for run in runs)
    return [
        Bar("one to three against the best peer", rate["Filao"] / _best(rate, [*EMBEDDED, *SERVERS]), 5),
        Bar("one to three, a share's distance from a third", uneven, 0.03, at_most=True),
        Bar("one to three, lost and doubled", wrong, 0, at_most=True),
    ]


def _waking(waking: dict[str, Any]) -> list[Bar]:
    judged = [Bar("an idle consumer, percent of a core", waking["idle"], 0.5, at_most=True)]
    if "Redis" in waking:
        ratio = waking["Filao"]["median"] / waking["Redis"]["median"]
        judged.append(Bar("send to receipt against Redis, median", ratio, 1.1, at_most=True))
    return judged


def _depth(depth: dict[str, Any]) -> list[Bar]:
    claims = depth["claims"]
    return [
        Bar("drain with 1,000,000 waiting against 20,000", depth["large"] / depth["small"], 0.9),
        *(
            Bar(f"a claim with much {case}, against nothing", claims[case] / claims["nothing"], 1.5, at_most=True)
            for case in claims
            if case != "nothing"
        ),
    ]


def _space(space: dict[str, Any]) -> list[Bar]:
    memory = space["memory"]
    return [
        Bar("the file after a drained backlog, of its size", space["drained"] / space["full"], 0.1, at_most=True),
        Bar("memory at the end against after a tenth", memory[-1] / memory[0], 1.1, at_most=True),
    ]


def _working(working: dict[str, Any]) -> list[Bar]:
    enqueue, process, memory = working["enqueue"], working["process"], working["memory"]
    on_rabbitmq = _best(enqueue, ["Dramatiq", "Celery"])
    return [
        Bar(
            "jobs processed against the best framework", process["Filao"] / _best(process, set(process) - {"Filao"}), 3
        ),
        Bar("jobs enqueued against Dramatiq and Celery", enqueue["Filao"] / on_rabbitmq, 10),
        Bar("jobs enqueued against huey", enqueue["Filao"] / _best(enqueue, ["huey"]), 5),
        Bar("leases lost by handlers that burn CPU", working["burning"]["lost"], 0, at_most=True),
        Bar("a worker's memory at the end against after a tenth", memory[-1] / memory[0], 1.1, at_most=True),
    ]


def _views(found: dict[str, dict[str, float]]) -> list[Bar]:
    ours = found["Filao"]
    others = [(name, figures) for name, figures in found.items() if name != "Filao"]
    rates = [
        Bar(f"a view that sends, requests a second against {name}", ours["rate"] / f["rate"], 1) for name, f in others
    ]
    return rates + [
        Bar(f"a view that sends, p99 against {name}", ours["p99"] / figures["p99"], 1, at_most=True)
        for name, figures in others
    ]


def _postgresql(found: dict[str, Any]) -> list[Bar]:
    send, drain, claim = found["send"], found["drain"], found["claim"]
    return [
        Bar("PostgreSQL: send-one against SKIP LOCKED by hand", send["Filao"] / send["by hand"], 4),
        Bar("PostgreSQL: send-one against pgqueuer", send["Filao"] / send["pgqueuer"], 10),
        Bar("PostgreSQL: drain against pgqueuer", drain["Filao"] / drain["pgqueuer"], 2),
        Bar(
            "PostgreSQL: a claim at 1,000,000 waiting against 600", claim["deep"] / claim["shallow"], 1.2, at_most=True
        ),
        Bar("PostgreSQL: MiB of table after 500,000 messages", found["table"]["after"], 50, at_most=True),
    ]


def _old_transactions(found: dict[str, dict[str, float]]) -> list[Bar]:
    without, during = found["without"], found["with"]
    return [
        Bar("PostgreSQL, under an old transaction: wait for a message in ms, p99", during["p99"], 50, at_most=True),
        Bar("PostgreSQL, under an old transaction: what gets through", during["burst"] / without["burst"], 0.8),
    ]


def _sandbox(found: dict[str, Any]) -> list[Bar]:
    return [
        Bar("sandbox, 2,000 claims: the server's answer in ms, median", found["http"], 200, at_most=True),
        Bar("sandbox, 2,000 claims: the page's answer in ms, median", found["page"], 200, at_most=True),
        Bar("sandbox, 2,000 claims: longest time without a frame in ms", found["gap"], 50, at_most=True),
        Bar("sandbox, 2,000 claims: the page's longest task in ms of CPU", found["task"], 50, at_most=True),
        Bar("sandbox: first paint in ms", found["painted"], 1000, at_most=True),
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the rates."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "send-one, 64 producers": found.get("sending", {}).get("together"),
        "send-one, a lone producer": found.get("sending", {}).get("alone"),
        "drain, one consumer": found.get("draining", {}).get("drain"),
        "one producer, three consumers": found.get("competing", {}).get("rate"),
        "jobs, two worker processes": found.get("working", {}).get("process"),
    }
    shown = {title: figures for title, figures in panels.items() if figures}
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 4), squeeze=False)
    for axis, (title, figures) in zip(axes[0], shown.items(), strict=True):
        names = sorted(figures, key=lambda name: figures[name])
        colours = ["#0a7f6f" if name == "Filao" else "#b8c4c2" for name in names]
        drawn = axis.barh(names, [figures[name] for name in names], color=colours)
        axis.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("messages a second, each durable", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
