"""Filao's figures for Prometheus: of a store (`store.py`), with alert rules and a Grafana dashboard for them beside it.

It needs `prometheus-client`, from the extra `prometheus`; the rules and the dashboard are plain files.
"""
