"""A Django view that sends one message: `gunicorn bench.jobs.view:application`, BENCH_SYSTEM says by what."""

import os
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

from bench.jobs import tally

SYSTEM = os.environ["BENCH_SYSTEM"]


def _sender() -> Callable[[], object]:
    if SYSTEM == "Filao":
        import filao
        import filao.sync

        broker = filao.sync.connect(tally.FOLDER / "filao.db")
        broker.open()
        broker.declare(filao.Queue("jobs"))
        return lambda: broker.send_to_queue("jobs", 7)
    noop: Any
    if SYSTEM == "huey":
        from bench.jobs.huey_app import noop

        return lambda: noop(7)
    from bench.jobs.dramatiq_app import noop

    return lambda: noop.send(7)


def view(_: HttpRequest) -> HttpResponse:
    send()
    return HttpResponse(status=204)


settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], MIDDLEWARE=[], LOGGING_CONFIG=None)
urlpatterns = [path("", view)]
application = get_wsgi_application()
send = _sender()
