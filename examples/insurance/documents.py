"""The document generator: `filao work examples.insurance.documents:worker`. It writes a PDF for each policy.

A second run writes the same file again, so the work is idempotent by nature; the file appears whole or not at all.
"""

from dataclasses import dataclass

from fpdf import FPDF

import filao
import filao.sync
from examples.insurance.settings import DOCUMENTS, QUEUES, documents

worker = filao.Worker(QUEUES, grace=20)


@dataclass(frozen=True, slots=True)
class Order:
    """What the policy service sends."""

    policy: int
    holder: str


@worker.consumer(documents, timeout=60)
def print_policy(message: filao.sync.Message[Order]) -> None:
    """Write the PDF of a policy; a plain function, so it runs in a thread."""
    order = message.body
    page = FPDF()
    page.add_page()
    page.set_font("Helvetica", size=20)
    page.cell(text=f"Policy {order.policy}", new_x="LMARGIN", new_y="NEXT")
    page.set_font("Helvetica", size=12)
    holder = order.holder.encode("latin-1", "replace").decode("latin-1")  # all that the built-in fonts can show
    page.cell(text=f"Holder: {holder}", new_x="LMARGIN", new_y="NEXT")
    DOCUMENTS.mkdir(exist_ok=True)
    draft = DOCUMENTS / f"policy-{order.policy}.{message.attempt}.tmp"
    page.output(str(draft))
    draft.replace(DOCUMENTS / f"policy-{order.policy}.pdf")
