"""What one API process can push: its CPU time per token and tokens per second, over an engine that costs nothing (tests/echo_core.py).

python tools/streams.py [--streams 256,1024] [--tokens 512]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


async def serve() -> None:
    """In a child: prints its port, then its CPU seconds for every line that it reads."""
    import uvicorn

    from miniinfer.config import EngineConfig, ServerConfig
    from miniinfer.engine.client import AsyncEngine
    from miniinfer.serve.fleet import Fleet
    from miniinfer.serve.server import uvicorn_config
    from miniinfer.serve.service import Service

    engine = AsyncEngine(EngineConfig(model="echo", tokenizer="bundled"), core="echo_core:EchoCore")
    await engine.start()
    server = uvicorn.Server(uvicorn_config(Fleet.of(Service(engine, ServerConfig(max_waiting=8192, max_connections=8192), "echo", {}))))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        print(time.process_time(), flush=True)
    server.should_exit = True
    await running
    await engine.shutdown()


async def load(port: int, streams: int, tokens: int) -> tuple[float, int]:
    """Seconds until all streams have ended, and how many events they had."""
    body = json.dumps({"prompt": [40, 50, 60, 70], "max_tokens": tokens, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head + body).encode())
        events = 0
        while part := await reader.read(1 << 16):
            events += part.count(b"data: {")
        writer.close()
        return events

    begin = time.perf_counter()
    events = await asyncio.gather(*(one() for _ in range(streams)))
    return time.perf_counter() - begin, sum(events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="256,1024", help="comma list (256,1024)")
    parser.add_argument("--tokens", type=int, default=512, help="of each stream (512)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        uvloop.run(serve())
        return
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        port = int(child.stdout.readline())

        def cpu() -> float:
            assert child.stdin and child.stdout
            print(file=child.stdin, flush=True)
            return float(child.stdout.readline())

        uvloop.run(load(port, 8, 10))
        for streams in map(int, asked.streams.split(",")):
            for _ in range(3):
                before = cpu()
                seconds, events = uvloop.run(load(port, streams, asked.tokens))
                tokens = streams * asked.tokens
                print(
                    f"{streams} streams of {asked.tokens} tokens: {tokens / seconds:,.0f} tok/s in {events / tokens:.2f} events a token, "
                    f"{1e6 * (cpu() - before) / tokens:.1f} us of CPU a token",
                    flush=True,
                )
        child.stdin.close()


if __name__ == "__main__":
    main()
