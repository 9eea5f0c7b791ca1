"""The torture of Filao: processes killed at random, a history written outside the engine, and an independent checker.

    python -m tests.torture --kills 200 --seed 7

`history.py` says what is written down, `actors.py` are the processes that are killed, `checker.py` reads the history
and knows nothing of the engine. `disk.py` is a disk whose power can be cut, `clerk.py` the program that faults hit.
"""
