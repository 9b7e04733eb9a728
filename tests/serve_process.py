"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import http.client
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

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
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
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.greeting)
        assert found
        self.url, self.port = found[0], int(found[1])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60, **options)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
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
