"""`manage.py filao_worker`: `filao work` with the worker of FILAO["WORKER"], in this process or in several."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

import os
import sys
from typing import Any

from django.conf import ENVIRONMENT_VARIABLE, settings
from django.core.management.base import BaseCommand

from filao.contrib.django.running import TARGET

_OPTIONS = ("processes", "max_messages", "max_memory", "health", "log_level")


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Runs until SIGTERM or Ctrl-C; see `filao work --help`."""

    help = "Run the worker of FILAO['WORKER'] until SIGTERM or Ctrl-C. The options are those of `filao work`."

    def add_arguments(self, parser: Any) -> None:
        """Take the options of `filao work`."""
        for name in _OPTIONS:
            parser.add_argument(f"--{name.replace('_', '-')}", help="See `filao work --help`.")

    def handle(self, *_: Any, **options: Any) -> None:
        """Become `filao work`, so that it is the process that signals and supervisors know."""
        os.environ.setdefault(ENVIRONMENT_VARIABLE, settings.SETTINGS_MODULE)
        given = [(f"--{name.replace('_', '-')}", options[name]) for name in _OPTIONS if options[name] is not None]
        command = [sys.executable, "-m", "filao", "work", TARGET, *(part for pair in given for part in pair)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, command)  # noqa: S606  # no shell: a list of arguments
