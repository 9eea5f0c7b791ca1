"""MODULE:NAME on a command line: an object in a module of the user's, which is imported, the current folder first."""

import importlib
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType

from filao.cli.shell import usage
from filao.errors import FilaoError

NOTHING = object()
"""Stands for an object that a module does not have."""
_IMPORTING = (__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


def imported(name: str) -> ModuleType:
    """Import a module; where it fails, show the module's own traceback alone, and raise what says so in one line."""
    if name.endswith(".py") or "/" in name:
        dotted = name.removesuffix(".py").strip("./").replace("/", ".")
        raise usage(f"{name!r} is a path, and a module is named as where it is imported: {dotted}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise usage(f"there is no module {name!r} here ({Path.cwd()}) or among what is installed") from error
        with suppress(OSError):
            traceback.print_exception(error.with_traceback(_within_module(error.__traceback__)))
        if isinstance(error, FilaoError):
            raise
        raise usage(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error


def found_in(module: ModuleType, attribute: str) -> object:
    """Return an object of a module, or of a class or an instance there; `NOTHING` when there is none."""
    found: object = module
    for part in attribute.split("."):
        found = getattr(found, part, NOTHING)
    return found


def _within_module(frames: TracebackType | None) -> TracebackType | None:
    """Return the frames of a module that cannot be imported, without ours and those of the import that lead to it."""
    while frames is not None and frames.tb_frame.f_code.co_filename in _IMPORTING:
        frames = frames.tb_next
    return frames
