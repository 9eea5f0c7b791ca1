"""What happens to RabbitMQ: nodes that die, connections that are reset, alarms that block who sends.

It may deliver twice what was received or acknowledged just before a fault: it has no fencing. Nothing may be lost.
"""

import asyncio
from contextlib import closing
from pathlib import Path

import filao
from tests.chaos.account import Chaos, scenario, under_load
from tests.support.proxy import Proxy
from tests.support.servers import rabbitmq_cluster, rabbitmq_server

ALARM = 5.0  # seconds for which senders are blocked
CLAIMS: filao.Queue = filao.Queue("claims.processing", max_attempts=1_000, backoff=filao.Backoff(first=0.0))


@scenario("RabbitMQ")
async def node_crash(folder: Path) -> Chaos:
    """Kill the only node and start it, twice."""
    with rabbitmq_server(folder / "server") as server:
        async with under_load(server.url(), queue=CLAIMS) as chaos:
            for _ in range(2):
                await asyncio.to_thread(server.crash)
                await asyncio.to_thread(server.start)
                await chaos.recovered()
        return chaos


@scenario("RabbitMQ")
async def connection_resets(folder: Path) -> Chaos:
    """Reset all connections ten times, each time as soon as work goes on."""
    with rabbitmq_server(folder / "server") as server, closing(Proxy(server.port)) as proxy:
        async with under_load(server.url(proxy.port), server.url(), queue=CLAIMS) as chaos:
            for _ in range(10):
                proxy.reset()
                await chaos.recovered()
        return chaos


@scenario("RabbitMQ")
async def rolling_node_kills(folder: Path) -> Chaos:
    """Kill each of three nodes in turn, and start it again before the next."""
    with rabbitmq_cluster(folder / "nodes", 3) as nodes:
        ports = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        async with under_load(f"amqp://guest:guest@{ports}/", queue=CLAIMS) as chaos:
            for node in nodes:
                await asyncio.to_thread(node.crash)
                await chaos.recovered()
                await asyncio.to_thread(node.start)
                await chaos.load.resumes()
        return chaos


@scenario("RabbitMQ")
async def memory_alarm(folder: Path) -> Chaos:
    """Leave the server too little memory for a while: it blocks who sends, and serves who consumes."""
    with rabbitmq_server(folder / "server") as server:
        async with under_load(server.url(), queue=CLAIMS) as chaos:
            await asyncio.to_thread(server.command, "set_vm_memory_high_watermark", "0.000001")
            sent = chaos.confirmed
            await asyncio.sleep(ALARM)
            chaos.remarks.append(f"{chaos.confirmed - sent:,} sends were confirmed during the alarm")
            await asyncio.to_thread(server.command, "set_vm_memory_high_watermark", "0.4")
            await chaos.recovered()
        return chaos
