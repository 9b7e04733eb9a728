"""What operators see of a real server: JSON logs of both processes, metrics, loads, explained misses, and a span at a collector."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from serve_process import ServerProcess

PROMPT = "Once upon a time there was a little engine that could not stop counting the pages of its own cache, one after the other."


def test_logs_metrics_loads_and_explanations(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = ServerProcess("bundled", log, "--log-format", "json", "--log-level", "info", "--page-size", "16")
    try:
        client = server.client()

        def details(**more: Any) -> Any:
            fields = {"model": "bundled", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "extra_headers": {"x-request-id": "mine"}}
            return client.completions.create(**fields, extra_body={"explain_cache": True, **more}).usage.prompt_tokens_details.model_dump()

        first, again, salted = details(), details(), details(cache_salt="mine")
        assert first["cached_tokens"] == 0 and first["cache_misses"] == [{"prompt": 0, "position": 0, "reason": "never_seen"}]
        assert again["cached_tokens"] > 0 and "cache_misses" not in again
        assert salted["cache_misses"] == [{"prompt": 0, "position": 0, "reason": "other_salt"}]
        assert server.metric("vllm:request_queue_time_seconds_count") == 3 == server.metric("vllm:request_prefill_time_seconds_count")
        assert 0 <= server.metric("vllm:request_queue_time_seconds_sum") < 3
        (load,) = json.loads(server.get("/v1/loads")[1])["loads"]
        assert load["num_total_reqs"] == 0 and load["max_total_num_tokens"] > 1000 and 0 < load["cache_hit_rate"] < 1
        assert server.stop() == 0
    finally:
        server.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"miniinfer.engine.core", "miniinfer.serve.logs"} <= {line["logger"] for line in lines}
    mine = [line for line in lines if line.get("request_id") == "mine"]
    assert len(mine) == 3 and all(line["status"] == 200 and line["output_tokens"] == 2 and line["queue_ms"] < 1000 for line in mine)
    assert "little engine" not in log.read_text()


def test_a_span_reaches_the_collector(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    seen: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server = ServerProcess("bundled", tmp_path / "log", "--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}")
    try:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = server.client().completions.create(model="bundled", prompt="Hi", max_tokens=2, extra_headers={"traceparent": parent})
        assert server.stop() == 0  # which sends what is waiting
    finally:
        server.close()
    end = time.monotonic() + 5
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    collector.shutdown()
    collector.server_close()
    assert any(bytes.fromhex(parent[3:35]) in body and answer.id.encode() in body for body in seen)
