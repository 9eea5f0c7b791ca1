"""The torture of Filao: processes killed at random, a history written outside the engine, and an independent checker.

    python -m tests.torture --minutes 10 --engine sqlite

`history.py` says what is written down, `checker.py` reads the history and knows nothing of the engine, and
`__main__.py` kills, stops and ends processes. Those are `producers.py`, `consumers.py`, `workers.py`, `operator.py` and
`auditor.py`; `scene.py` is what they share, `actors.py` the list of them and what is done in the end. To add a part,
write a module with a `play(scene)`, and name it there; to add a promise, write a function in the checker, and a forged
history in `tests/test_torture.py` that breaks it. `disk.py` is a disk whose power can be cut, `clerk.py` the program
that faults hit.
"""
