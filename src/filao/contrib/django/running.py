"""The worker of FILAO["WORKER"], as `filao work` loads it in each of the processes of `manage.py filao_worker`."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from typing import Any

TARGET = "filao.contrib.django.running:worker"


def __getattr__(name: str) -> Any:
    if name != "worker":
        raise AttributeError(name)
    import django
    from django.apps import apps
    from django.utils.module_loading import import_string

    if not apps.ready:
        django.setup()
    return import_string(named_worker().replace(":", "."))


def named_worker() -> str:
    """Return what FILAO["WORKER"] names; for the command and its processes, once Django is set up."""
    from django.core.exceptions import ImproperlyConfigured

    from filao.contrib.django.configuration import configured

    named: str | None = configured("WORKER")
    if not named:
        raise ImproperlyConfigured(
            'FILAO["WORKER"] names no worker: set it to "module:attribute", as "shop.queues:worker"'
        )
    return named
