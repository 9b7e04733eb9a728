"""The benchmarks: floors against published figures, workloads, percentiles, and both commands end to end on something tiny."""

from __future__ import annotations

import asyncio
import json
import time
import xml.etree.ElementTree as ElementTree
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from miniinfer import cli
from miniinfer.bench import floors, offline, plot, serving, traces
from miniinfer.config import ConfigError, ModelConfig

SHAPES = Path(floors.__file__).parent / "shapes"


def shape(name: str) -> ModelConfig:
    return ModelConfig.from_folder(SHAPES / name)


# ------------------------------------------------------------------------------------------------------------ floors


def floor(name: str, workload: str) -> float:
    """Floor of a workload on an H200: TTFT or TPOT in ms, or output tok/s."""
    model, work = shape(name), offline.Workload.parse(workload)
    seconds = floors.batch_seconds(model, work.requests, floors.H200)
    if work.kind in ("nano", "tput"):
        return sum(output for _, output in work.requests) / seconds
    first = floors.batch_seconds(model, [(prompt, 1) for prompt, _ in work.requests], floors.H200)
    return first * 1e3 if work.kind == "pre" else (seconds - first) / offline.DECODE_STEPS * 1e3


@pytest.mark.parametrize(
    ("name", "workload", "expected"),
    [
        ("Qwen3-0.6B", "nano", 37_400),
        ("Qwen3-8B", "dec1", 3.39),
        ("Qwen3-8B", "dec8", 3.66),
        ("Qwen3-8B", "dec32", 4.57),
        ("Qwen3-8B", "dec128", 8.19),
        ("Qwen3-8B", "pre1", 20),
        ("Qwen3-8B", "pre8", 188),
        ("Qwen3-8B", "pre32", 1123),
        ("Qwen3-8B", "lng32", 4.43),
        ("Qwen3-8B", "tput512", 10_100),
        ("Qwen3-30B-A3B", "dec1", 1.38),
        ("Qwen3-30B-A3B", "dec32", 12.7),
        ("Qwen3-30B-A3B", "dec128", 16.8),
        ("Qwen3-30B-A3B", "pre8", 103),
    ],
)
def test_floors_agree_with_the_table_in_docs(name: str, workload: str, expected: float) -> None:
    assert floor(name, workload) == pytest.approx(expected, rel=0.015)


def test_weights_alone_bound_a_small_model() -> None:
    """0.265 ms is the read of the 0.6B's weights; its dec1 floor adds the keys and values of 1,152 tokens."""
    model = shape("Qwen3-0.6B")
    assert floors.used_parameters(model) * 2 / floors.H200.read * 1e3 == pytest.approx(0.265, rel=0.005)
    assert floor("Qwen3-0.6B", "dec1") == pytest.approx(0.265 + 1152 * 114_688 / 4.5e12 * 1e3, rel=0.005)


def test_used_parameters() -> None:
    dense, sparse = shape("Qwen3-8B"), shape("Qwen3-30B-A3B")
    norms = dense.num_layers * (2 * dense.hidden_size + 2 * dense.head_dim) + dense.hidden_size
    assert floors.used_parameters(dense) == dense.num_parameters - dense.vocab_size * dense.hidden_size - norms
    assert floors.used_parameters(sparse, 1) < floors.used_parameters(sparse, 8) < floors.used_parameters(sparse, 1e6)
    everything = sparse.num_parameters - sparse.vocab_size * sparse.hidden_size
    assert floors.used_parameters(sparse, 1e6) == pytest.approx(everything, rel=1e-4)


def test_windows_bound_keys_read_and_pairs() -> None:
    raw = json.loads((SHAPES / "Qwen3-8B" / "config.json").read_text())
    windowed = ModelConfig.from_hf({**raw, "architectures": ["MistralForCausalLM"], "sliding_window": 1000})
    assert floors.kv_bytes(windowed, 5000) == floors.kv_bytes(windowed, 1000) == 1000 * windowed.kv_bytes_per_token()
    assert floors.kv_bytes(windowed, 500) == 500 * windowed.kv_bytes_per_token()
    full = ModelConfig.from_hf({**raw, "architectures": ["LlamaForCausalLM"]})
    short, long = [(900, 5)], [(9000, 5)]
    assert floors.batch_seconds(windowed, short, floors.H200) == floors.batch_seconds(full, short, floors.H200)
    assert floors.batch_seconds(windowed, long, floors.H200) < floors.batch_seconds(full, long, floors.H200)


def test_machine_is_measured() -> None:
    machine = floors.machine_of("cpu", "float32")
    assert 1e9 < machine.read < 1e13 and 1e9 < machine.matmul < 1e15


# ----------------------------------------------------------------------------------------------------------- offline


def test_workloads() -> None:
    assert offline.Workload.parse("dec8").requests == [(1024, 257)] * 8
    assert offline.Workload.parse("pre32").requests == [(32 * 1024, 1)]
    assert offline.Workload.parse("lng4").requests == [(4096, 257)]
    skew = [size for size, _ in offline.Workload.parse("skew64").requests]
    assert (skew.count(500), skew.count(2000), skew.count(30_000)) == (32, 28, 4)
    assert offline.Workload.parse("tput512").requests == [(1024, 512)] * 512
    nano = offline.Workload.parse("nano").requests
    assert len(nano) == 256 and sum(output for _, output in nano) == 133_966  # as nano-vllm's README states it
    assert all(100 <= n <= 1024 for pair in nano for n in pair)
    for wrong in ("dec", "dec0", "nano3", "pre-1", "decode8", ""):
        with pytest.raises(ConfigError, match="workload"):
            offline.Workload.parse(wrong)


def test_share_is_of_the_floor() -> None:
    assert offline.Result("dec1", "tpot_ms", 4.0, 3.0, {}).share == 0.75
    assert offline.Result("nano", "output_tok_s", 300.0, 400.0, {}).share == 0.75
    line = offline.Result("dec1", "tpot_ms", 4.0, 3.0, {"tok_per_s": 250.0, "GB_per_s": 3456.0}).line()
    assert "4.000 ms TPOT" in line and "75%" in line and "250.0 tok/s" in line and "3,456.0 GB/s" in line


def test_offline_runs_on_a_bare_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "machine_of", lambda device, dtype: floors.H200)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1500, "max_position_embeddings": 2048, "torch_dtype": "float32", "eos_token_id": 3,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = f"bench offline --model {tmp_path} --workload dec2,pre1,tput3 --repeats 1 --kernels reference --num-threads 1 --device cpu".split()
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert [(r["workload"], next(k for k in r if k != "workload")) for r in last["results"]] == [
        ("dec2", "ttft_ms"), ("dec2", "tpot_ms"), ("pre1", "ttft_ms"), ("tput3", "output_tok_s"),
    ]  # fmt: skip
    assert all(r["floor"] > 0 and r["share"] > 0 for r in last["results"])
    assert 0 < last["ready_seconds"] <= last["first_token_seconds"]
    assert sum("floor" in line for line in lines[:-1]) == 4


# ----------------------------------------------------------------------------------------------------------- serving


class Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as asked for, one a millisecond, cutting the byte stream at odd places; every fifth request fails."""

    protocol_version = "HTTP/1.1"
    lock = Lock()
    bodies: list[dict[str, Any]] = []
    open = most = 0

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "fake"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Handler.lock:
            Handler.bodies.append(body)
            number = len(Handler.bodies)
            Handler.open += 1
            Handler.most = max(Handler.most, Handler.open)
        self._answer(body, number)

    def _count_out(self) -> None:
        """Before the last byte: from then on the client may send its next request."""
        with Handler.lock:
            Handler.open -= 1

    def _answer(self, body: dict[str, Any], number: int) -> None:
        if number % 5 == 0:
            self._count_out()
            self.send_error(503, "busy")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = "messages" in body
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}] if chat else [{"text": ""}]}]
        events += [{"choices": [{"delta": {"content": "é"}}] if chat else [{"text": "é"}]} for _ in range(body["max_tokens"])]
        events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}})
        stream = b"".join(b"data: " + json.dumps(e, ensure_ascii=False).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n"
        for start in range(0, len(stream), 37):
            piece = stream[start : start + 37]
            self.wfile.write(f"{len(piece):X};x=y\r\n".encode() + piece + b"\r\n")
            time.sleep(0.0005)
        self._count_out()
        self.wfile.write(b"0\r\nTrailer: 1\r\n\r\n")


@pytest.fixture
def server() -> Any:
    Handler.bodies, Handler.open, Handler.most = [], 0, 0
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("load", ["--concurrency 4", "--rate 400", "--concurrency 3 --endpoint chat", "--concurrency 2 --prompt tokens"])
def test_serving_measures_a_server(server: str, load: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"bench serving --url {server}/v1 --num-requests 20 --input-len 5:9 --output-len 3:6 {load}".split()
    assert cli.main(argv) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (got["requests"], got["errors"], got["model"]) == (20, 4, "fake")
    assert sum(got["error_kinds"].values()) == 4 and next(iter(got["error_kinds"])).startswith("503")
    answered = [body for number, body in enumerate(Handler.bodies, 1) if number % 5]
    tokens = sum(body["max_tokens"] for body in answered)
    assert got["output_tok_per_s"] * got["seconds"] == pytest.approx(tokens, rel=0.02)
    assert got["prompt_tok_per_s"] * got["seconds"] == pytest.approx(7 * 16, rel=0.02)
    assert {body["max_tokens"] for body in answered} <= {3, 4, 5, 6} and all(body["ignore_eos"] and body["stream"] for body in answered)
    assert 0 < got["ttft_ms"]["p50"] <= got["ttft_ms"]["p99"] <= got["e2e_ms"]["p99"] and got["tpot_ms"]["mean"] > 0 and got["itl_ms"]["p99"] > 0
    prompts = [body["messages"][0]["content"] if "messages" in body else body["prompt"] for body in Handler.bodies]
    assert all(5 <= len(p if isinstance(p, list) else p.split()) <= 9 for p in prompts)
    assert len({str(p) for p in prompts}) == 20
    if "--concurrency" in load:
        assert Handler.most <= int(load.split()[1])


def test_serving_against_nothing_fails_each_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("bench serving --url http://127.0.0.1:9 --model x --num-requests 3".split()) == 1
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["errors"] == 3 and got["ttft_ms"] is None and got["output_tok_per_s"] == 0


def answer_of(response: bytes) -> serving.Timing:
    """One request to a server that says just these bytes and closes."""

    async def run() -> serving.Timing:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            await writer.drain()
            writer.close()

        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            load = serving.Load(serving.ServingBench(url=f"http://127.0.0.1:{port}", num_requests=1, timeout=20), "m")
            return await load.one(load.bodies[0])

    return asyncio.run(run())


def test_broken_streams_count_as_errors() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    done = b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    good = answer_of(head % len(event + done) + event + done)
    assert good.error is None and len(good.texts) == 1 and good.output_tokens == 1
    assert answer_of(b"HTTP/1.0 200 OK\r\n\r\n" + event + done).error is None  # ended by the end of the connection
    for response, said in [
        (head % len(event) + event, "without [DONE]"),
        (head % 1000 + event, "middle of the response"),
        (b"", "middle of the response"),
        (b"SSH-2.0-x\r\n\r\n", "ParserError"),
        (head % len(done) + done, "no text"),
        (head % 14 + b'data: {"error"', "without [DONE]"),
        (head % 30 + b'data: {"error": {"a": "boom"}}', "without [DONE]"),
        (head % 31 + b'data: {"error": {"a": "boom"}}\n', "boom"),
        (head % 9 + b"data: {]\n", "Expecting property name"),
    ]:
        assert said in (answer_of(response).error or ""), response


def test_percentiles_and_summary() -> None:
    assert serving.percentile([3, 1, 2], 50) == 2 and serving.percentile([0, 10], 90) == 9 and serving.percentile([5], 99) == 5
    first = serving.Timing(sent=0.0, texts=[1.0, 2.0, 4.0], ended=4.0, prompt_tokens=10, output_tokens=4)
    second = serving.Timing(sent=1.0, texts=[1.5], ended=5.0, prompt_tokens=20, output_tokens=1)
    failed = serving.Timing(sent=0.5, ended=10.0, error="503: busy")
    got = serving.summary([first, second, failed])
    assert (got["requests"], got["errors"], got["seconds"], got["error_kinds"]) == (3, 1, 10.0, {"503: busy": 1})
    assert got["ttft_ms"]["mean"] == 750 and got["tpot_ms"] == {"mean": 1000, "p50": 1000, "p90": 1000, "p99": 1000}
    assert got["itl_ms"]["mean"] == 1500 and got["e2e_ms"]["p50"] == 4000
    assert got["prompt_tok_per_s"] == 3 and got["output_tok_per_s"] == 0.5 and got["requests_per_s"] == 0.2


def test_arrivals_are_poisson() -> None:
    load = serving.Load(serving.ServingBench(rate=50, num_requests=4000, input_len="1", output_len="1"), "m")
    mean = sum(load.gaps) / len(load.gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert sum((g - mean) ** 2 for g in load.gaps) / len(load.gaps) == pytest.approx(mean**2, rel=0.1)  # exponential: variance = mean squared


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_len": "9:3"},
        {"output_len": "0"},
        {"rate": 0.0},
        {"num_requests": 0},
        {"url": "localhost:8000"},
        {"burstiness": 0.0},
        {"slo": "ttft"},
        {"slo": "itl=3"},
        {"slo": "tpot=-1"},
        {"slo": ""},
        {"plot": "/no/such/folder/x.svg"},
    ],
)
def test_serving_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        serving.ServingBench(**wrong)


def test_burstiness_shapes_the_gaps() -> None:
    def variation(shape: float) -> float:
        load = serving.Load(serving.ServingBench(rate=50, burstiness=shape, num_requests=4000, input_len="1", output_len="1"), "m")
        mean = sum(load.gaps) / len(load.gaps)
        assert mean == pytest.approx(1 / 50, rel=0.1)
        return sum((g - mean) ** 2 for g in load.gaps) / len(load.gaps) / mean**2

    assert variation(0.25) == pytest.approx(4, rel=0.2) and variation(4) == pytest.approx(0.25, rel=0.2)


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    quick = serving.Timing(sent=0.0, texts=[0.1, 0.2], ended=0.2, output_tokens=2)
    one = serving.Timing(sent=0.0, texts=[0.1], ended=0.1, output_tokens=1)  # has no TPOT, and so meets any
    late = serving.Timing(sent=0.0, texts=[0.5, 0.6], ended=0.6, output_tokens=2)
    slow = serving.Timing(sent=0.0, texts=[0.1, 1.0], ended=1.0, output_tokens=2)
    failed = serving.Timing(sent=0.0, texts=[0.1], ended=2.0, error="broke")
    timings = [quick, one, late, slow, failed]
    assert serving.objectives("ttft=200, tpot=150") == {"ttft": 200, "tpot": 150}
    got = serving.summary(timings, serving.objectives("ttft=200, tpot=150"))["goodput"]
    assert (got["requests_per_s"], got["share"]) == (1.0, 0.4)
    assert serving.summary(timings, {"e2e": 150})["goodput"]["share"] == 0.2
    assert "goodput" not in serving.summary(timings)


# ------------------------------------------------------------------------------------------------------------- traces


def read(path: Path, *entries: Any, **options: Any) -> list[traces.Item]:
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return traces.read(str(path), serving.WORDS, options.pop("as_tokens", False), **options)


def block(timestamp: int, size: int, hashes: list[int], output: int = 5) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": size, "output_length": output, "hash_ids": hashes}


def test_conversations_and_prompts_are_read(tmp_path: Path) -> None:
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "x" * 100}
    system = {"role": "system", "content": "be brief"}
    items = read(
        tmp_path / "a.jsonl",
        {"id": "1", "conversations": [gpt, human, gpt, human]},
        "",
        {"messages": [system, {"role": "user", "content": "yo"}], "max_tokens": 7},
        {"prompt": "once", "output_len": 3},
        {"prompt": [1, 2]},
    )
    user = {"role": "user", "content": "hi"}
    assert items == [
        traces.Item([user], 25),
        traces.Item([system, {"role": "user", "content": "yo"}], 7),
        traces.Item("once", 3),
        traces.Item([1, 2], traces.SHORTEST),
    ]
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": [human, gpt]}] * 3))
    assert traces.read(str(tmp_path / "b.json"), serving.WORDS, False, 2) == [traces.Item([user], 25)] * 2


@pytest.mark.parametrize("as_tokens", [False, True])
def test_equal_hashes_share_prefixes(tmp_path: Path, as_tokens: bool) -> None:
    entries = [block(3000, 1500, [7, 8, 9]), block(1000, 1100, [7, 8, 4]), block(1500, 30, [8])]
    items = read(tmp_path / "t.jsonl", *entries, as_tokens=as_tokens)
    assert [item.at for item in items] == [0, 0.5, 2] and [item.output for item in items] == [5] * 3
    second, third, first = (item.prompt if isinstance(item.prompt, list) else item.prompt.split() for item in items)
    assert [len(p) for p in (first, second, third)] == [1500, 1100, 30]
    assert first[:1024] == second[:1024] and first[1024:1100] != second[1024:] and third == first[512:542]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "x.jsonl:2: not JSON"),
        ("7", "x.jsonl:2: expected an object"),
        ({"text": "a"}, "x.jsonl:2: needs 'conversations'"),
        ({"prompt": ""}, "x.jsonl:2: needs"),
        ({"prompt": [1, "a"]}, "x.jsonl:2: needs"),
        ({"prompt": "a", "output_len": 0}, "x.jsonl:2: 'output_len' must be a whole number from 1"),
        ({"prompt": "a", "timestamp": "soon"}, "x.jsonl:2: 'timestamp'"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "x.jsonl:2: turn 0 needs a role"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "x.jsonl:2: the conversation has no turn of a user"),
        ({"messages": "hi"}, "x.jsonl:2: a conversation must be a list"),
        (block(0, 600, [1]), "x.jsonl:2: 1 hash_ids for an input_length of 600; blocks of 512 tokens make 2"),
        (block(0, 5, ["a"]), "x.jsonl:2: 'hash_ids' must be"),  # type: ignore[list-item]
        (block(-1, 5, [1]), "x.jsonl:2: 'timestamp' must be a whole number from 0"),
        ({"prompt": "a", "timestamp": 3}, "1 of 2 requests have a timestamp"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "x.jsonl", {"prompt": "fine"}, line)
    assert said in str(error.value) and str(error.value).startswith("dataset: ")


def test_a_missing_or_empty_dataset(tmp_path: Path) -> None:
    for text, said in (("", "holds no requests"), ("[1", "Expecting")):
        with pytest.raises(ConfigError, match=said):
            read(tmp_path / "y.jsonl", *([text] if text else []))
    with pytest.raises(ConfigError, match="No such file"):
        traces.read(str(tmp_path / "none.jsonl"), serving.WORDS, False)
    read(tmp_path / "z.jsonl", {"prompt": [1, 2]})
    with pytest.raises(ConfigError, match="endpoint: .*token ids"):
        serving.Load(serving.ServingBench(dataset=str(tmp_path / "z.jsonl"), endpoint="chat"), "m")


def test_a_trace_is_replayed_at_its_times(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path / "t.jsonl", *(block(150 * i, 600, [1, i + 2], 4) for i in range(4)))
    argv = f"bench serving --url {server} --dataset {tmp_path}/t.jsonl --slo ttft=10000,tpot=1 --result {tmp_path}/r.json --plot {tmp_path}/p.svg"
    assert cli.main(argv.split()) == 0
    said = capsys.readouterr().out.splitlines()
    last, saved = json.loads(said[-1]), json.loads((tmp_path / "r.json").read_text())
    assert "4 requests at their trace's times" in said[0] and "goodput" in said[2]
    assert last["requests"] == 4 and last["errors"] == 0 and last["goodput"]["slo_ms"] == {"ttft": 10000, "tpot": 1}
    assert {name: saved[name] for name in last} == last
    assert [row["sent"] for row in saved["each"]] == pytest.approx([0, 0.15, 0.3, 0.45], abs=0.08)
    assert all(row["output_tokens"] == 4 and row["e2e_ms"] >= row["ttft_ms"] > 0 for row in saved["each"])
    prompts = [body["prompt"].split() for body in Handler.bodies]
    assert all(len(p) == 600 and p[:512] == prompts[0][:512] for p in prompts) and [body["max_tokens"] for body in Handler.bodies] == [4] * 4
    ElementTree.parse(tmp_path / "p.svg")


def test_conversations_go_to_both_endpoints(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    read(tmp_path / "c.jsonl", {"conversations": turns})
    for endpoint in ("chat", "completions"):
        assert cli.main(f"bench serving --url {server} --dataset {tmp_path}/c.jsonl --endpoint {endpoint} --json".split()) == 0
    chat, completion = Handler.bodies
    assert [m["role"] for m in chat["messages"]] == ["system", "user"] and completion["prompt"] == "be kind\n\nhello"


# -------------------------------------------------------------------------------------------------------------- plots


def test_plots_show_their_points() -> None:
    assert plot.distribution([3.0, 1.0, 2.0, 4.0]) == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1)] and plot.distribution([]) == []
    assert len(plot.distribution([float(i) for i in range(10_000)])) == 200
    assert plot.over_time([(0.1, 2), (0.9, 4), (9.9, 1)], 10, bins=10)[0] == (0.5, 6) and plot.over_time([(10, 1)], 10, bins=10)[-1] == (9.5, 1)
    assert plot.open_at([(0, 6), (5, 10)], 10, bins=2) == [(2.5, 1), (7.5, 1)]
    page = plot.page("<a> & b", [plot.Panel("t", "x", "y", {"l": [(0, 0), (10, 5)]}, limit=20), plot.Panel("none", "x", "y", {"l": []})])
    root = ElementTree.fromstring(page)
    lines = [element.attrib["points"] for element in root.iter() if element.tag.endswith("polyline")]
    assert lines == ["58.0,210.0 231.0,34.0", ""]  # half of the width, because the limit is at 20
    assert "&lt;a&gt; &amp; b" in page and "objective" in page


@pytest.mark.parametrize("most", [1e-3, 0.3, 1, 7, 99, 1000, 123456])
def test_ticks_are_few_and_reach_the_end(most: float) -> None:
    ticks = plot._ticks(most)
    assert ticks[0] == 0 and 3 <= len(ticks) <= 7 and most <= ticks[-1] * 1.0000001 and ticks[-2] < most
