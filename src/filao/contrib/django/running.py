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
    from django.core.exceptions import ImproperlyConfigured
    from django.utils.module_loading import import_string

    from filao.contrib.django.configuration import configured

    if not apps.ready:
        django.setup()
    named: str | None = configured("WORKER")
    if not named:
        raise ImproperlyConfigured(
            'FILAO["WORKER"] names no worker: set it to "module:attribute", as "shop.queues:worker"'
        )
    return import_string(named.replace(":", "."))
