"""The same no-op job on each worker framework: how it is enqueued, and how two processes work on it.

The place of each is in the environment: BENCH_FOLDER for files, BENCH_RABBITMQ for the server's port.
"""
