"""The scenario EVT-02, to learn from: a producer sends insurance claims, competing consumers process them, and are
killed.

Whatever happens is real: processes of their own, a file in a temporary folder, a SIGKILL. `room.py` is what there is,
`steps.py` the lesson; `web/` and `terminal.py` are the two faces of it.
"""
