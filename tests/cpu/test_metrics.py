"""What the server tells its operators: /metrics, the dashboard over it, the log's line for a request, traces, /v1/loads, explained cache misses."""

from __future__ import annotations

import http.client
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from serve_fake import FakeEngine, Server

from miniinfer import cli, utils
from miniinfer.cache.manager import CacheManager
from miniinfer.config import ConfigError
from miniinfer.data import Admission, CompletionOutput, SamplingParams, SequenceUpdate
from miniinfer.engine.text import Tokenizer
from miniinfer.serve import loads, logs, tracing
from miniinfer.serve.metrics import Metrics, Timer, render
from miniinfer.serve.record import Record, current

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "a secret question"}]}


class Queued(FakeEngine):
    """Every sequence has waited 20 ms, and its prompt's page was evicted."""

    def _update(self, id: str, token: int, finish: str | None, prompt: list[int] | None) -> SequenceUpdate:
        update = super()._update(id, token, finish, prompt)
        if prompt is not None:
            update.admission = Admission(0.02, "evicted" if self.seen[-1][1].explain_cache else None)
        return update


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(Queued(tokenizer)) as server:
        yield server


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        connection.request("GET", path, headers=sent)
    else:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **sent})
    response = connection.getresponse()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode()


def samples(text: str) -> dict[str, float]:
    """Values by name and labels, the model's left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


# ---------------------------------------------------------------------------------------------------------- metrics


def timed(metrics: Metrics, *updates: tuple[int, int, str | None], choices: int = 1) -> Timer:
    timer = Timer(metrics, "a", [10], choices, SamplingParams(n=choices))
    timer.admitted(0, 0.0)
    for index, tokens, end in updates:
        timer.update(index, CompletionOutput(index, "", [1] * tokens, finish_reason=end))
    return timer


def metrics_of(name: str, stats: dict[str, float] | None = None) -> Metrics:
    engine = FakeEngine(None)
    engine.stats = stats or {}
    return Metrics(lambda: engine, name)


def test_every_choice_is_counted_once() -> None:
    metrics = metrics_of("m")
    timed(metrics, (0, 1, None), (1, 1, None), (0, 3, None), (0, 1, "stop"), choices=2).close("abort", [4])
    got = samples(render([metrics]).decode())
    assert got["vllm:prompt_tokens_total"] == 10 and got["vllm:generation_tokens_total"] == 6
    assert {r: got[f"vllm:request_success_total{{finished_reason={r}}}"] for r in ("stop", "length", "abort", "error")} == {
        "stop": 1, "length": 0, "abort": 1, "error": 0,
    }  # fmt: skip
    counts = {name: got[f"vllm:{name}_count"] for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")}
    assert counts == {"time_to_first_token_seconds": 2, "inter_token_latency_seconds": 2}
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time"):
        assert got[f"vllm:{name}_seconds_count"] == 1, name
    assert got["vllm:request_generation_tokens_sum"] == 5 and got["vllm:request_generation_tokens_bucket{le=2.0}"] == 0
    assert got["vllm:request_prompt_tokens_bucket{le=10.0}"] == 1 == got["vllm:request_prompt_tokens_bucket{le=+Inf}"]
    assert (got["vllm:request_params_n_sum"], got["vllm:request_params_max_tokens_sum"]) == (2, 16)
    assert (got["vllm:request_max_num_generation_tokens_sum"], got["vllm:request_prefill_kv_computed_tokens_sum"]) == (5, 6)


def test_several_models_share_a_page() -> None:
    text = render([metrics_of("one", {"running": 2}), metrics_of('t"wo\n', {"running": 3})]).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["model_name"]: s.value for s in families["vllm:num_requests_running"].samples} == {"one": 2, 't"wo\n': 3}
    assert len(re.findall("^# TYPE vllm:num_requests_running ", text, re.MULTILINE)) == 1


def test_metrics_of_a_server(server: Server) -> None:
    assert ask(server, CHAT, HELLO)[0] == 200 and ask(server, CHAT, {"messages": []})[0] == 400
    server.engine.stats = {"running": 2.0, "waiting": 1.0, "kv_usage": 0.5, "prefix_queries": 10, "prefix_hits": 4, "preemptions": 3}
    server.engine.info |= {"page_size": 16, "num_pages": [100]}
    got = samples(ask(server, "/metrics")[2])
    assert (got["vllm:num_requests_running"], got["vllm:num_requests_waiting"], got["vllm:kv_cache_usage_perc"]) == (2, 1, 0.5)
    assert (got["vllm:prefix_cache_queries_total"], got["vllm:prefix_cache_hits_total"], got["vllm:num_preemptions_total"]) == (10, 4, 3)
    assert got["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.02) and got["vllm:time_to_first_token_seconds_count"] == 1
    assert got["miniinfer_request_errors_total{status=400}"] == 1
    assert got["vllm:cache_config_info{block_size=16,num_gpu_blocks=100}"] == 1
    plain = samples(ask(server, "/metrics?names=plain")[2])
    assert {name.replace("vllm:", "miniinfer_") for name in got} == set(plain)
    status, _, text = ask(server, "/metrics?names=other")
    assert status == 400 and json.loads(text)["error"]["param"] == "names"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_finds_nothing(server: Server) -> None:
    """But the colons of vLLM's names, on the page that has them."""
    assert ask(server, CHAT, HELLO)[0] == 200 and ask(server, "/nowhere")[0] == 404

    def lint(page: str) -> tuple[int, list[str]]:
        run = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
        return run.returncode, [line for line in (run.stdout + run.stderr).splitlines() if "not contain ':'" not in line]

    assert lint(ask(server, "/metrics?names=plain")[2]) == (0, [])
    assert lint(ask(server, "/metrics")[2])[1] == []
    assert lint("# TYPE a_total gauge\na_total 1\n")[0] != 0  # it does look


def test_the_dashboard_shows_what_is_exported(server: Server) -> None:
    server.engine.info |= {"page_size": 16, "num_pages": [100]}
    assert ask(server, CHAT, {"messages": []})[0] == 400
    exported = {name.partition("{")[0] for name in samples(ask(server, "/metrics")[2])}
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    shown += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    named = set(re.findall(r"\b(?:vllm:|miniinfer_)\w+", " ".join(shown)))
    assert len(shown) > 20 and named and named <= exported, named - exported
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_following_a_stream_is_cheap() -> None:
    """A token of a stream costs the server some 50 us; following it must not be felt. Measured: 0.6 us."""
    timer = Timer(metrics_of("m"), "a", [10], 1, SamplingParams())
    delta = CompletionOutput(0, "x", [1])
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2000):
            timer.update(0, delta)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 10e-6


# ------------------------------------------------------------------------------------------------------------- logs


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
    """The first so many lines of the request log, as JSON writes them."""
    caplog.set_level(logging.INFO, "miniinfer.serve.logs")

    def read(count: int) -> list[dict[str, Any]]:
        end = time.monotonic() + 5
        while len(found := [r for r in caplog.records if r.name == "miniinfer.serve.logs"]) < count and time.monotonic() < end:
            time.sleep(0.005)
        return [json.loads(utils._JsonFormatter().format(record)) for record in found]

    yield read


def test_a_line_for_every_request(server: Server, lines: Callable[[int], list[dict[str, Any]]]) -> None:
    headers = ask(server, CHAT, HELLO, x_request_id="their-own/7", authorization="Bearer sk-hidden")[1]
    assert headers["x-request-id"] == "their-own/7"
    (line,) = lines(1)
    assert line["request_id"] == "their-own/7" and line["answer_id"].startswith("chatcmpl-") and line["client"] == "127.0.0.1"
    assert (line["method"], line["path"], line["status"], line["model"], line["finish_reason"]) == ("POST", CHAT, 200, "tiny", "stop")
    assert line["prompt_tokens"] > 5 and line["output_tokens"] == 5 and line["cached_tokens"] == 3
    assert line["queue_ms"] == 20 and 0 < line["ttft_ms"] <= line["total_ms"]
    assert line["level"] == "info" and line["time"].endswith("+00:00")
    assert "secret" not in str(line) and "hidden" not in str(line) and "hello there" not in str(line)
    assert "5 of output, stop" in line["message"]


def test_lines_of_streams_errors_and_probes(server: Server, lines: Callable[[int], list[dict[str, Any]]]) -> None:
    assert ask(server, "/health")[0] == 200  # not worth a line
    streamed = ask(server, CHAT, {**HELLO, "stream": True, "n": 2}, x_request_id="no\tspaces")[1]["x-request-id"]
    refused = ask(server, CHAT, {**HELLO, "temperature": -1})[1]["x-request-id"]
    assert ask(server, "/nothing%0ahere?key=hidden", x_request_id="x" * 200)[0] == 404
    stream, refusal, missing = lines(3)
    assert stream["request_id"] == streamed == stream["answer_id"] and stream["output_tokens"] == 10
    assert refusal["request_id"] == refused and refused.startswith("req-") and refusal["status"] == 400 and "answer_id" not in refusal
    assert missing["path"] == "/nothing%0ahere" and missing["status"] == 404 and missing["request_id"].startswith("req-")


def test_a_client_that_leaves_is_logged(server: Server, lines: Callable[[int], list[dict[str, Any]]]) -> None:
    server.engine.delay = 0.05
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", CHAT, json.dumps({**HELLO, "stream": True}), {"content-type": "application/json"})
    connection.getresponse().read(10)
    connection.close()
    (line,) = lines(1)
    assert line["finish_reason"] == "abort" and 0 < line["output_tokens"] < 5


def test_log_formats_of_a_process() -> None:
    code = """
import sys
from miniinfer.utils import get_logger, setup_logging
setup_logging("info", sys.argv[1])
try: 1 / 0
except ZeroDivisionError: get_logger("x").exception("it %s", "broke", extra={"fields": {"n": 1}})
import subprocess
subprocess.run([sys.executable, "-c", "from miniinfer.utils import get_logger, setup_logging; setup_logging(); get_logger('child').info('here')"])
"""
    run = {form: subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True, cwd=ROOT).stderr for form in ("json", "text")}
    first, child = [json.loads(line) for line in run["json"].splitlines()]
    assert (first["level"], first["logger"], first["message"], first["n"]) == ("error", "miniinfer.x", "it broke", 1)
    assert "ZeroDivisionError" in first["exception"] and child["message"] == "here"
    assert "E miniinfer.x: it broke" in run["text"] and "I miniinfer.child: here" in run["text"]


def test_words_and_fields_of_a_record() -> None:
    record = Record("POST", "/v1/completions", None, "id", seconds=0.5, status=200)
    assert logs.fields(record) == {"request_id": "id", "method": "POST", "path": "/v1/completions", "status": 200, "total_ms": 500}
    token = current.set(record)
    timed(metrics_of("m"), (0, 2, None), (1, 1, "stop"), choices=2).close("error", [6])
    current.reset(token)
    got = logs.fields(record)
    assert (got["prompt_tokens"], got["cached_tokens"], got["output_tokens"], got["finish_reason"]) == (10, 6, 3, "error,stop")


# ----------------------------------------------------------------------------------------------------------- traces


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .*miniinfer\[otel\]"):
        tracing.check("http://127.0.0.1:4318")
    assert cli.main("serve bundled --otlp-endpoint http://127.0.0.1:4318 --port 0".split()) != 0
    assert "miniinfer[otel]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="otlp_endpoint: expected http"):
        tracing.check("collector:4317")


def test_opentelemetry_is_imported_only_when_asked_for() -> None:
    """Its parts that cost time; some versions of FastAPI look for its API by themselves."""
    code = "import sys, miniinfer.serve.server; print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


def test_a_span_for_every_request(server: Server) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    exporter = memory.InMemorySpanExporter()
    tracer = tracing.Tracer("http://127.0.0.1:9", exporter)
    server.fleet.sinks.append(tracer)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert ask(server, CHAT, {**HELLO, "max_tokens": 3, "temperature": 0.5}, traceparent=parent, x_request_id="mine")[0] == 200
    assert ask(server, "/v1/completions", {"prompt": "x", "stream": True}, traceparent="garbage")[0] == 200
    assert ask(server, "/v1/models")[0] == 200
    end = time.monotonic() + 5
    while len(exporter.get_finished_spans()) < 2 and time.monotonic() < end:
        tracer._provider.force_flush()
    chat, completion = sorted(exporter.get_finished_spans(), key=lambda span: span.name)
    assert (chat.name, completion.name) == ("chat tiny", "text_completion tiny")
    assert f"{chat.context.trace_id:032x}" == parent[3:35] and f"{chat.parent.span_id:016x}" == parent[36:52] and completion.parent is None
    got = dict(chat.attributes)
    assert got["gen_ai.request.model"] == "tiny" and got["gen_ai.usage.output_tokens"] == 3 and got["gen_ai.usage.input_tokens"] > 5
    assert got["gen_ai.response.finish_reasons"] == ("length",) and got["gen_ai.request.max_tokens"] == 3 and got["gen_ai.request.temperature"] == 0.5
    assert got["gen_ai.latency.time_in_queue"] == 0.02 and 0 < got["gen_ai.latency.time_to_first_token"] <= got["gen_ai.latency.e2e"]
    assert got["http.response.status_code"] == 200 and got["gen_ai.request.id"] == "mine" and "secret" not in str(got)
    assert 0 < chat.end_time - chat.start_time < 5e9 and abs(chat.end_time - time.time_ns()) < 60e9
    tracer.shutdown()


def test_spans_go_over_http() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    seen: list[tuple[str, bytes]] = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    sink = HTTPServer(("127.0.0.1", 0), Sink)
    Thread(target=sink.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    tracer = tracing.Tracer(f"http://127.0.0.1:{sink.server_port}")
    tracer(Record("POST", CHAT, None, "id", seconds=0.1, status=200, answer_id="chatcmpl-1", model="m", finish_reasons=["stop"]))
    tracer(Record("GET", "/v1/models", None, "id", status=200))
    tracer.shutdown()
    sink.shutdown()
    sink.server_close()
    ((path, body),) = seen
    assert path == "/v1/traces" and b"chatcmpl-1" in body and b"gen_ai.response.finish_reasons" in body


def test_a_sink_that_fails_harms_nobody(server: Server) -> None:
    seen: list[Record] = []
    server.fleet.sinks[:0] = [lambda record: 1 / 0, seen.append]
    assert ask(server, CHAT, HELLO)[0] == 200 and ask(server, "/live")[0] == 200
    assert len(seen) >= 1


# ------------------------------------------------------------------------------------------------------- loads, cache


def test_loads(server: Server) -> None:
    server.engine.info |= {"page_size": 16, "num_pages": [100, 50], "max_num_seqs": 8}
    server.engine.stats = {"running": 2.0, "waiting": 3.0, "kv_usage": 0.5, "prefix_queries": 10.0, "prefix_hits": 4.0}
    status, _, text = ask(server, "/v1/loads")
    got = json.loads(text)
    (one,) = got["loads"]
    assert status == 200 and got["dp_rank_count"] == 1 and got["timestamp"]
    assert (one["num_running_reqs"], one["num_waiting_reqs"], one["num_total_reqs"], one["max_running_requests"]) == (2, 3, 5, 8)
    assert (one["num_used_tokens"], one["max_total_num_tokens"], one["token_usage"]) == (400, 800, 0.5)
    assert one["cache_hit_rate"] == 0.4 and one["utilization"] == 0.5 and one["gen_throughput"] == 0
    assert json.loads(ask(server, "/load")[2]) == {"server_load": 0}
    loads.Loads.model_validate(got)


def test_throughput_between_polls() -> None:
    rate = loads._Rate()
    assert [rate(count, now) for count, now in ((0, 0.0), (50, 1.0), (400, 4.0), (400, 4.0))] == [0, 50, 100, 100]
    assert rate(400, 13.0) == 0 or rate(400, 13.0) < 40
    assert rate(400, 40.0) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_miss_is_explained_on_request(server: Server, stream: bool) -> None:
    body = {**HELLO, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})

    def details(**headers: str) -> dict[str, Any]:
        text = ask(server, CHAT, body, **headers)[2]
        answer = json.loads(text.split("\n\n")[-3][6:]) if stream else json.loads(text)
        return answer["usage"]["prompt_tokens_details"]

    assert details() == {"cached_tokens": 3}
    explained = {"cached_tokens": 3, "cache_misses": [{"prompt": 0, "position": 3, "reason": "evicted"}]}
    assert details(x_explain_cache="1") == explained and details(x_explain_cache="0") == {"cached_tokens": 3}
    body["explain_cache"] = True
    assert details() == explained


def test_every_metric_and_reason_is_documented(server: Server) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    server.engine.info |= {"page_size": 16, "num_pages": [100]}
    assert ask(server, CHAT, {"messages": []})[0] == 400
    exported = {re.sub(r"_(bucket|sum|count)$", "", name.partition("{")[0]) for name in samples(ask(server, "/metrics")[2])}
    assert set(re.findall(r"`((?:vllm:|miniinfer_)\w+)`", text)) == exported
    reasons = text.partition("## Why")[2].partition("\n## ")[0]
    assert set(re.findall(r'"(\w+)"', CacheManager.explain.__doc__ or "")) == set(re.findall(r"^\| `(\w+)` \|", reasons, re.MULTILINE))
