"""`python -m bench.jobs PEER COUNT`: enqueue so many, and print how many a second."""

import asyncio
import importlib
import sys
import time

app = importlib.import_module(f"bench.jobs.{sys.argv[1].lower()}_app")
asyncio.run(app.enqueue(1))  # to connect, and to declare
began = time.monotonic()
asyncio.run(app.enqueue(int(sys.argv[2])))
print(int(sys.argv[2]) / (time.monotonic() - began))
