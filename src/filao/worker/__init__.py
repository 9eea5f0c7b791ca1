"""Workers: handlers for queues, with leases kept, timeouts, retries and a graceful stop.

`worker` receives and stops; `pool` and `turns` say what may start; `run` is one attempt at one message, with
`handlers`, `threads` and `outcomes`; `keeper` extends the leases. `supervisor` runs several processes.
"""

from filao.worker.outcomes import Outcomes, Reject, Release, Retry
from filao.worker.run import Handled, WorkerGuarantee
from filao.worker.worker import Status, Worker

__all__ = ["Handled", "Outcomes", "Reject", "Release", "Retry", "Status", "Worker", "WorkerGuarantee"]
