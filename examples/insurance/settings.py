"""Where the insurer keeps its files, and which guarantee its claims workers give: from the environment, read once."""

import os
from pathlib import Path

import filao

FOLDER = Path(os.environ.get("INSURANCE_FOLDER", "."))
BUSINESS = FOLDER / "business.db"
QUEUES = FOLDER / "queues.db"
DOCUMENTS = FOLDER / "documents"
GUARANTEE = os.environ.get("INSURANCE_GUARANTEE", "exactly-once")

claims = filao.Queue("claims.processing", lease=30, max_attempts=20)
documents = filao.Queue("documents", lease=60, max_attempts=5)

outbox, inbox = filao.Outbox(), filao.Inbox()
