"""Metrics for Prometheus: of a store (`store.py`) and of a worker (`worker.py`), with alert rules and a dashboard.

It needs `prometheus-client`, from the extra `prometheus`. The alert rules and the Grafana dashboard are plain files.
"""

from importlib import import_module

from filao.extras import Extra

with Extra("filao[prometheus]", of="filao.prometheus"):
    import_module("prometheus_client")  # of all modules here
