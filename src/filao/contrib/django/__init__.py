"""Django: the queue of the settings, sends that keep to `atomic()`, `manage.py filao_worker`, and system checks.

    INSTALLED_APPS = [..., "filao.contrib.django"]
    FILAO = {"QUEUES": ["shop.queues.documents"], "WORKER": "shop.queues:worker"}  # in the default database

    with transaction.atomic():
        policy = Policy.objects.create(holder=holder)
        broker().send_to_queue("documents", {"policy": policy.id})  # both or neither

`FILAO` may have these keys: `URL`, where the queue is, if not in the database; `DATABASE`, the alias of the database
whose transactions count ("default"); `QUEUES`, dotted paths of `filao.Queue`s (or lists of them), which `manage.py
migrate` declares; `WORKER`, the "module:attribute" that `manage.py filao_worker` runs; `DURABILITY`, as in
`filao.connect`.
"""

from importlib import import_module
from typing import Any

from filao.extras import Extra

with Extra("django", of="filao.contrib.django"):
    import_module("django")  # of all modules here

from filao.contrib.django.joining import Broker, broker
from filao.worker import Worker

__all__ = ["Broker", "broker", "worker"]


def worker(**options: Any) -> Worker:
    """Return a worker on the queue of the settings, with the options of `filao.Worker`.

    Where the queue is, is looked up when it runs: in Django's tests that is the test's database.

    Before and after each message it closes Django's connections that are too old or broken, as Django does around a
    request: those of the handler's thread or, for a coroutine function, of the thread of Django's async calls. When it
    ends it closes them all.
    """
    from filao.contrib.django.configuration import queue_engine
    from filao.contrib.django.connections import HandlersConnections

    made, its = Worker(queue_engine, **options), HandlersConnections()
    made.lifespan(its.until_the_end)
    made.middleware(its.around_coroutine)
    made.middleware(its.around_function)
    return made
