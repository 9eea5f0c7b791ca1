"""The contract, as checks that run against any engine: what `send`, `receive` and the rest promise, line by line.

Each `check_…` is a coroutine function that gets a `Stage`: a broker, a clock that can be moved, and a way to open a
second broker on the same storage. It raises `AssertionError` when a promise does not hold. `checks(features)` lists the
checks that an engine with these features must pass. Nothing here knows an engine or needs a test framework.
"""

from filao.conformance import control, delivery, effects, failure, history, ordering, sending
from filao.conformance.stage import Check, Stage, checks, needed_by
from filao.conformance.verification import Verdict, verify

__all__ = [
    "Check",
    "Stage",
    "Verdict",
    "checks",
    "control",
    "delivery",
    "effects",
    "failure",
    "history",
    "needed_by",
    "ordering",
    "sending",
    "verify",
]
