"""`manage.py filao_worker`: `filao work` with the worker of FILAO["WORKER"], in this process or in several."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from django.conf import ENVIRONMENT_VARIABLE, settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from filao.contrib.django.running import TARGET, named_worker
from filao.process import flush_output, this_python

_OPTIONS = ("processes", "max_messages", "max_memory", "health", "log_level", "log", "metrics")
_FLAGS = ("reload", "until_idle")


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Runs until SIGTERM or Ctrl-C; see `filao work --help`."""

    help = "Run the worker of FILAO['WORKER'] until SIGTERM or Ctrl-C. The options are those of `filao work`."

    def add_arguments(self, parser: Any) -> None:
        """Take the options of `filao work`."""
        for name in _OPTIONS:
            parser.add_argument(f"--{name.replace('_', '-')}", help="See `filao work --help`.")
        parser.add_argument("--queue", action="append", default=[], help="See `filao work --help`.")
        for name in _FLAGS:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="See `filao work --help`.")

    def handle(self, *_: Any, **options: Any) -> None:
        """Become `filao work`, so that it is the process that signals and supervisors know."""
        try:
            named_worker()
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        os.environ.setdefault(ENVIRONMENT_VARIABLE, settings.SETTINGS_MODULE)
        os.environ["PYTHONPATH"] = os.pathsep.join(_before_the_library(sys.path))
        given = [(f"--{name.replace('_', '-')}", options[name]) for name in _OPTIONS if options[name] is not None]
        given += [("--queue", queue) for queue in options["queue"]]
        python = this_python(told_where=True)
        command = [*python, "-m", "filao", "work", TARGET, *(part for pair in given for part in pair)]
        command += [f"--{name.replace('_', '-')}" for name in _FLAGS if options[name]]
        flush_output()
        os.execv(sys.executable, command)  # noqa: S606  # no shell: a list of arguments


def _before_the_library(path: Iterable[str]) -> Iterator[str]:
    """Yield the folders that stand before Python's own: that of manage.py, wherever it was started, and those of
    --pythonpath and of PYTHONPATH.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    zipped = library.with_name(f"python{sys.version_info.major}{sys.version_info.minor}.zip")
    for folder in path:
        if Path(folder) in (library, zipped):
            return
        if folder:
            yield folder
