"""Starting and stopping: what a user sees of mistakes, of signals, and of the engine's death."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from serve_process import ROOT, ServerProcess, wait_for


def refused(*arguments: str) -> str:
    """The one line of a start that fails for the user's mistake."""
    command = [sys.executable, "-m", "miniinfer", "serve", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(str(folder), "--port", port)
        assert port in line and "in use" in line
    assert "no-such-folder" in refused(str(tmp_path / "no-such-folder"), "--port", "0")
    assert "nowhere.jinja" in refused(str(folder), "--port", "0", "--chat-template", str(tmp_path / "nowhere.jinja"))
    assert "99999" in refused(str(folder), "--port", "99999")


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Any:
    running = ServerProcess(folder, tmp_path / "server.log", "--served-model-name", "mine", "--log-level", "debug")
    yield running
    running.close()


class Streaming(threading.Thread):
    """A client with an open stream of up to `tokens`; its end is in `error` or `reason`."""

    def __init__(self, server: ServerProcess, tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.tokens = server, tokens
        self.parts, self.error, self.reason = 0, "", ""
        self.start()
        assert wait_for(lambda: self.parts > 2)

    def run(self) -> None:
        try:
            body = {"ignore_eos": True}
            for chunk in self.server.client().completions.create(model="mine", prompt="x", max_tokens=self.tokens, stream=True, extra_body=body):
                self.parts += 1
                self.reason = chunk.choices[0].finish_reason or self.reason
        except openai.APIError as e:
            self.error = str(e)


def test_a_stopping_server_lets_streams_end(own: ServerProcess) -> None:
    assert own.client().models.list().data[0].id == "mine"
    client = Streaming(own, 300)
    assert own.stop(signal.SIGTERM) == 0
    client.join(10)
    assert (client.reason, client.error) == ("length", "")
    assert "Traceback" not in own.log.read_text()


def test_a_second_signal_stops_at_once(own: ServerProcess) -> None:
    clients = [Streaming(own, 500) for _ in range(8)]
    own.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    start = time.monotonic()
    assert own.stop(signal.SIGINT) == 0
    assert time.monotonic() - start < 4
    for client in clients:
        client.join(10)
        assert client.reason == "length" or "shutting down" in client.error
    assert "Traceback" not in own.log.read_text()


def test_a_signal_while_loading_ends_the_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miniinfer", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode in (0, 130) and "Traceback" not in error


def test_an_engine_that_died_for_good_is_reported(folder: Path, tmp_path: Path) -> None:
    own = ServerProcess(folder, tmp_path / "server.log", "--served-model-name", "mine", "--max-engine-restarts", "0")
    try:
        client = Streaming(own, 500)
        os.kill(own.engine_pid(), signal.SIGKILL)
        client.join(10)
        assert "died" in client.error
        assert own.get("/health")[0] == 503 and own.get("/live")[0] == 200
        with pytest.raises(openai.InternalServerError) as dead:
            own.client().completions.create(model="mine", prompt="x")
        assert dead.value.status_code == 503
        assert own.stop(signal.SIGTERM) == 0
    finally:
        own.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(folder: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *names]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    for options, message in (
        (["--ssl-certfile", str(certificate)], "give both, or neither"),
        (["--ssl-certfile", str(certificate), "--ssl-keyfile", str(certificate)], "cannot be used"),
    ):
        assert message in refused(str(folder), *options)
    options = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--grpc-port", "0"]
    own = ServerProcess(folder, tmp_path / "server.log", "--served-model-name", "mine", *options)
    try:
        assert own.url.startswith("https://")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)))
        assert own.client(http_client=trusting).completions.create(model="mine", prompt="x", max_tokens=3).usage.completion_tokens == 3
        with pytest.raises(httpx.ConnectError, match="(?i)certificate"):
            httpx.get(own.url + "/models")
        remote = re.search(r"over gRPC at (\S+)", own.greeting)
        assert remote
        with grpc.secure_channel(remote[1], grpc.ssl_channel_credentials(certificate.read_bytes())) as channel:
            health = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes)
            assert health(b"", timeout=10) == b"\x08\x01"  # status: SERVING
        assert own.stop(signal.SIGTERM) == 0
    finally:
        own.close()
