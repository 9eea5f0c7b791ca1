"""The scenario EVT-02, to learn from: a producer sends insurance claims; competing consumers process them and die.

All that happens is real: separate processes, a file in a temporary folder, a SIGKILL. `room.py` is the insurer,
`steps.py` the lesson; `web/` and `terminal.py` are its two faces.
"""
