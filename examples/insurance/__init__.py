"""An insurer: a portal takes claims and must not wait; three workers evaluate and pay them; a generator prints
policies.

    POST /claims ─▶ portal.py ─ insert + outbox ─▶ database ─▶ relay.py ─▶ claims.processing ─▶ claims.py (three
    workers) POST /policies ─▶ policies.py ──────────────▶    〃     ─▶    〃     ─▶ documents ─────────▶ documents.py
    (one PDF each)

The insurer's data live in `business.db`, the queues in `queues.db`. `python -m examples.insurance` runs it all.
"""
