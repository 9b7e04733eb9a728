"""Many clients at once: every stream complete and equal to itself alone, and nothing left behind by those that go away."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path

import uvicorn
from serve_process import ServerProcess, raw_request, stream, wait_for

from miniinfer.config import EngineConfig, ServerConfig
from miniinfer.engine.client import AsyncEngine
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.server import uvicorn_config
from miniinfer.serve.service import Service

CLIENTS = 256


def test_256_streams_are_complete_right_and_fair(server: ServerProcess) -> None:
    """More streams than the engine runs at once (64), greedy and seeded, with prompts of different lengths."""
    kinds = [
        {"prompt": [7 + i] * (3 + 9 * i), "max_tokens": 24, "temperature": i % 2 * 1.0, "seed": i, "ignore_eos": True, "top_k": 0} for i in range(16)
    ]

    async def main() -> None:
        alone = [await stream(server.port, kind) for kind in kinds]
        start = time.monotonic()
        together = await asyncio.gather(*[stream(server.port, kinds[i % 16]) for i in range(CLIENTS)])
        seconds = time.monotonic() - start
        assert [text for text, _ in together] == [alone[i % 16][0] for i in range(CLIENTS)]
        gaps = [b - a for _, times in together for a, b in zip(times, times[1:], strict=False)]
        assert max(gaps) < max(0.75 * seconds, 3.0), "a stream stood still while others went on"

    asyncio.run(main())
    assert wait_for(lambda: server.metric("vllm:num_requests_running") == 0 == server.metric("vllm:kv_cache_usage_perc"))


def test_500_disconnects_leave_nothing(folder: Path) -> None:
    """Clients that leave at every stage: before the request is whole, at once, within the stream, with several samples or prompts."""

    async def leave(port: int, number: int) -> None:
        rng = random.Random(number)
        fields = {"prompt": [5 + number % 200] * rng.randint(1, 300), "max_tokens": 200, "ignore_eos": True, "stream": rng.random() < 0.8}
        if rng.random() < 0.2:
            fields |= {"n": 3} if rng.random() < 0.5 else {"prompt": [[9, number % 300], [8, 7]]}
        request = raw_request(fields)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        stage = rng.random()
        writer.write(request[: rng.randint(1, len(request) - 1)] if stage < 0.1 else request)
        await writer.drain()
        if stage > 0.3:
            await asyncio.sleep(rng.random() * 0.3)
        if stage > 0.6 and fields["stream"]:
            await reader.read(rng.randint(1, 5000))
        if rng.random() < 0.5:  # a reset instead of a farewell
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort() if rng.random() < 0.5 else writer.close()

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1, max_num_seqs=16, num_pages=400))
        await engine.start()
        api = Service(engine, ServerConfig(), "tiny", {})
        server = uvicorn.Server(uvicorn_config(Fleet.of(api)))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        before, _ = await stream(port, {"prompt": "hello", "max_tokens": 20, "temperature": 0})
        for wave in range(10):
            await asyncio.gather(*[leave(port, 50 * wave + i) for i in range(50)])
        end = time.monotonic() + 20
        while (api.unfinished or engine.num_open) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert api.unfinished == 0 == engine.num_open
        assert await engine.control("check") is True
        stats = await engine.control("stats")
        assert stats["running"] == 0 == stats["waiting"] and stats["kv_usage"] == 0
        assert api.metrics.finished["abort"] >= 300  # most had begun
        assert await engine.control("reset_prefix_cache") is True
        assert (await stream(port, {"prompt": "hello", "max_tokens": 20, "temperature": 0}))[0] == before
        server.should_exit = True
        await serving
        await engine.shutdown()

    asyncio.run(main())
