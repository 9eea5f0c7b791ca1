"""Chaos on servers: scenario by scenario, under load, with what was lost, what was done twice, and how long it took to
recover.

    python -m tests.chaos                       # all
    python -m tests.chaos restart-immediate     # one, or as many as are named
    python -m tests.chaos --list

A scenario is an async function in `postgresql.py` or `rabbitmq.py`, decorated with `@scenario`; its docstring says what
happens. It gets a folder of its own, starts the servers that it needs (`tests/support/servers.py`), keeps them busy
with `under_load`, makes the fault, and calls `chaos.recovered()` at the moment at which the fault is over. The account
is kept by the senders and consumers themselves (`tests/support/load.py`); no engine is asked what it believes. What a
scenario promises beyond that it asserts itself.
"""
