"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).parents[1]


class ServerProcess:
    """`miniinfer serve` as a user starts it; ready when the constructor returns. Its log goes to a file."""

    def __init__(self, folder: Path | str, log: Path, *options: str) -> None:
        self.log = log
        fixed = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--num-threads", "1"]  # more threads slow a tiny model down
        command = [sys.executable, "-m", "miniinfer", "serve", str(folder), *fixed, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        assert self.process.stdout is not None
        self.greeting = ""
        while "curl" not in self.greeting:
            line = self.process.stdout.readline()
            assert line, f"the server did not start: {log.read_text()}"
            self.greeting += line
        found = re.search(r"https?://127\.0\.0\.1:(\d+)/v1", self.greeting)
        assert found
        self.url, self.port = found[0], int(found[1])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60, **options)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def engine_pids(self) -> list[int]:
        """The engine processes', of this moment."""
        return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True).stdout.split()]

    def engine_pid(self) -> int:
        return self.engine_pids()[0]

    def metric(self, name: str) -> float:
        """The value of a metric, with whatever labels."""
        found = re.search(rf"^{name}(?:\{{.*\}})? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        assert found, name
        return float(found[1])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def wait_for(condition: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def raw_request(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


async def stream(port: int, fields: dict[str, Any]) -> tuple[str, list[float]]:
    """The whole text of a stream, which must be complete, and when its parts came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw_request({**fields, "stream": True}))
    text, times, done, reason = "", [], False, None
    async for line in reader:
        if line == b"data: [DONE]\n":
            done = True
        elif line.startswith(b"data: "):
            (choice,) = json.loads(line[6:])["choices"]
            text, reason = text + choice["text"], choice["finish_reason"] or reason
            times.append(time.monotonic())
    writer.close()
    assert done and reason in ("stop", "length")
    return text, times
