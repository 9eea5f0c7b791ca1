"""The scenario EVT-02, to watch: a portal sends insurance claims, competing workers evaluate them, and one is killed.

Whatever happens is real: processes of their own, a file in a temporary folder, a SIGKILL. `terminal.py` is the program;
it shows what the processes write down in their journals, and ends with a ledger that is computed from these alone.
"""
