"""How a handler decides what becomes of its message: it returns, or raises, or returns or raises one of these.

returns                     the message is acknowledged
raises                      nack: again after the queue's backoff, a dead letter when its attempts are spent
Retry(delay=30)             nack: again after 30 seconds
Reject("no such policy")    a dead letter now
Release()                   back to its place at once, the attempt not counted
Release(delay=30)           back to its place after 30 seconds, the attempt not counted

A group of exceptions in which all are such decisions, as a `TaskGroup` raises, is the most final of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from filao import engine
from filao.checks import check_duration
from filao.codec import shown
from filao.errors import ConfigurationError
from filao.message import error_text

_OURS = str(Path(__file__).parent)


class Retry(Exception):
    """This attempt failed: again after `delay` seconds, or after the queue's backoff. Raise it or return it."""

    def __init__(self, reason: object = "", *, delay: float | None = None) -> None:
        super().__init__(reason)
        if delay is not None:
            check_duration("Retry", "delay", delay)
        self.reason = reason
        self.delay = delay


class Reject(Exception):
    """No attempt can succeed: the message becomes a dead letter. Raise it or return it."""

    def __init__(self, reason: object = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Release(Exception):
    """Not now, or not here: back to its place, at once or after `delay` seconds, the attempt not counted.

    Raise it or return it. A message can be released any number of times, until its `ttl` ends.
    """

    def __init__(self, *arguments: object, delay: float = 0.0) -> None:
        super().__init__(*arguments)
        if len(arguments) == 1 and isinstance(arguments[0], (int, float)):  # it would come again at once, for ever
            raise ConfigurationError(f"Release was given {arguments[0]!r}; a delay has its name: Release(delay=…)")
        check_duration("Release", "delay", delay)
        self.delay = delay


Steer = Retry | Reject | Release
Outcomes = Mapping[type[BaseException], Steer | type[Retry] | type[Reject] | type[Release]]


def of_value(value: object) -> engine.Outcome:
    """Return the outcome of a handler that returned; its value matters only if it is one of the three above."""
    steer = _steer(value)
    return engine.Ack() if steer is None else _outcome(steer, steer)


def of_error(error: BaseException, mapped: Outcomes) -> engine.Outcome:
    """Return the outcome of a handler that raised: its own decision, its consumer's for such an error, or a nack."""
    meant = _meant(error, mapped)
    return engine.Nack(error=error_text(error)) if meant is None else _outcome(*meant)


def is_decision(error: BaseException, mapped: Outcomes) -> bool:
    """Return whether raising this is a decision, not a failure, of the handler."""
    return _meant(error, mapped) is not None


def without_our_frames(error: BaseException) -> BaseException:
    """Return an error whose traceback begins in the handler."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    return error.with_traceback(trace)


def check_outcomes(outcomes: Outcomes | None) -> Outcomes:
    """Return a copy of the mapping. Raises `ConfigurationError` for one that cannot work."""
    if outcomes is not None and not isinstance(outcomes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"outcomes is {shown(outcomes)}; it must be a dict")
    mapped = dict(outcomes or {})
    for kind, steer in cast("Mapping[Any, Any]", mapped).items():
        if not (isinstance(kind, type) and issubclass(kind, BaseException)) or _steer(steer) is None:
            raise ConfigurationError(
                f"outcomes maps {shown(cast('object', kind))} to {shown(steer)}; map exception classes to "
                "filao.Retry, filao.Reject or filao.Release"
            )
    return mapped


def _meant(error: BaseException, mapped: Outcomes) -> tuple[Steer, BaseException] | None:
    """Return the decision that an error is, or is mapped to, with the error; of a group the most final one.

    A group of which one exception is no decision is none.
    """
    steer = _steer(error)
    if steer is None:
        nearest = next((kind for kind in type(error).__mro__ if kind in mapped), None)
        steer = _steer(mapped[nearest]) if nearest is not None else None
    if steer is not None:
        return steer, error
    if not isinstance(error, BaseExceptionGroup):
        return None
    group = cast("BaseExceptionGroup[BaseException]", error)
    meant = [_meant(one, mapped) for one in group.exceptions]
    decided = [one for one in meant if one is not None]
    return min(decided, key=_finality) if len(decided) == len(meant) else None  # of equals the first


def _finality(meant: tuple[Steer, BaseException]) -> int:
    steer, _ = meant
    return 0 if isinstance(steer, Reject) else 1 if isinstance(steer, Retry) else 2


def _steer(value: object) -> Steer | None:
    if isinstance(value, type) and issubclass(value, (Retry, Reject, Release)):
        return value()
    return value if isinstance(value, (Retry, Reject, Release)) else None


def _outcome(steer: Steer, error: BaseException) -> engine.Outcome:
    """Return the outcome of a decision; if it gives no reason, the error behind it is kept."""
    if isinstance(steer, Release):
        return engine.Release(steer.delay)
    says_nothing = isinstance(steer.reason, str) and not steer.reason
    behind = _behind(steer, error) if says_nothing else None
    told = steer.reason if behind is None else behind
    if isinstance(steer, Reject):
        return engine.Reject(error_text(told))
    return engine.Nack(steer.delay, error_text(told))


def _behind(steer: Steer, error: BaseException) -> BaseException | None:
    """Return the error that was mapped to a decision or, if it was raised itself, the one that it was raised for."""
    if error is not steer:
        return error
    if steer.__cause__ is not None or steer.__suppress_context__:
        return steer.__cause__
    return steer.__context__
