"""Workers: handlers for queues, with leases kept, timeouts, retries and a graceful stop.

`worker` is what is declared, `shift` one run of it; `pool` decides what may start; `run` is one attempt at one message,
with `handling`, `handlers`, `threads`, `outcomes` and `strays`; `surroundings` has lifespans and middleware; `keeper`
extends the leases, `pulse` watches the event loop, `outage` logs what fails, `signals` hears when to stop. `supervisor`
runs several processes.
"""

from filao.worker.handlers import WorkerGuarantee
from filao.worker.outcomes import Outcomes, Reject, Release, Retry
from filao.worker.run import Handled
from filao.worker.shift import Status
from filao.worker.worker import Worker

__all__ = ["Handled", "Outcomes", "Reject", "Release", "Retry", "Status", "Worker", "WorkerGuarantee"]
