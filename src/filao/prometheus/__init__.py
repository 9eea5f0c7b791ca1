"""Metrics for Prometheus: of a store (`store.py`) and of a worker (`worker.py`), with alert rules and a dashboard.

It needs `prometheus-client`, from the extra `prometheus`. The alert rules and the Grafana dashboard are plain files.
"""
