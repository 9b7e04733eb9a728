"""SGLang's API over a fake engine: generate in all its forms, streams, log-probabilities, the server's own routes, errors."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import END, FakeEngine, Server, read_events

from miniinfer.engine.text import Tokenizer


class Engine(FakeEngine):
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        super().__init__(tokenizer)
        self.commands: list[str] = []

    async def control(self, command: str) -> Any:
        self.commands.append(command)
        return True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(Engine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """A server over a fresh engine: what a test sets is gone after it."""
    running.engine = running.api.engine = Engine(running.engine.tokenizer)
    return running


def ask(server: Server, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def generate(server: Server, **fields: Any) -> Any:
    status, raw = ask(server, "POST", "/generate", fields)
    assert status == 200, raw
    return read_events(raw) if fields.get("stream") else json.loads(raw)


def test_a_text(server: Server) -> None:
    answer = generate(server, text="hello", sampling_params={"temperature": 0})
    tokens = [*server.engine.tokenizer.encode("hello there"), END]
    prompt, params, _, _ = server.engine.seen[0]
    assert answer["text"] == "hello there" and answer["output_ids"] == tokens
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": END} and meta["completion_tokens"] == len(tokens)
    assert meta["prompt_tokens"] == len(prompt) and meta["cached_tokens"] == 3 and meta["e2e_latency"] > 0
    assert params.max_tokens == 128 and params.temperature == 0


def test_ids_and_the_requests_own_id(server: Server) -> None:
    answer = generate(server, input_ids=[5, 6, 7], rid="mine", sampling_params={"max_new_tokens": 2})
    assert server.engine.seen[0][0] == [5, 6, 7] and answer["meta_info"]["id"] == "mine"
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


@pytest.mark.parametrize("prompts", [{"text": ["hello", "one two"]}, {"input_ids": [[5, 6], [7]]}])
def test_batches(server: Server, prompts: Any) -> None:
    answers = generate(server, **prompts, sampling_params=[{"max_new_tokens": 3}] * 2)
    assert [len(a["output_ids"]) for a in answers] == [3, 3] and len(server.engine.seen) == 2
    ended = {e["index"]: e for e in generate(server, **prompts, sampling_params={"max_new_tokens": 3}, stream=True)}
    assert [ended[i]["text"] for i in (0, 1)] == [a["text"] for a in answers]
    assert len(generate(server, text=["hello"])) == 1
    assert len(generate(server, text="hello", sampling_params={"n": 3})) == 3
    own = generate(server, **prompts, sampling_params=[{"max_new_tokens": 3}, {"max_new_tokens": 1, "temperature": 0.5}])
    assert [len(answer["output_ids"]) for answer in own] == [3, 1] and {seen[1].temperature for seen in server.engine.seen[-2:]} == {1.0, 0.5}


def test_events_hold_all_so_far(server: Server) -> None:
    whole = generate(server, text="hello")
    events = generate(server, text="hello", stream=True)
    assert len(events) == len(whole["output_ids"]) and "index" not in events[0]
    for i, event in enumerate(events, 1):
        assert event["output_ids"] == whole["output_ids"][:i] and whole["text"].startswith(event["text"])
    assert events[-1]["text"] == whole["text"] and events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert events[0]["meta_info"]["finish_reason"] is None


def test_logprobs(server: Server) -> None:
    answer = generate(server, input_ids=[5, 6, 7], return_logprob=True, top_logprobs_num=2, logprob_start_len=1, return_text_in_logprobs=True)
    meta, text = answer["meta_info"], server.engine.tokenizer.token_text
    assert meta["input_token_logprobs"] == [[-0.006, 6, text(6)], [-0.007, 7, text(7)]]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    first = answer["output_ids"][0]
    assert meta["output_top_logprobs"][0][0] == [-first / 1000, first, text(first)] and len(meta["output_top_logprobs"][0]) == 2
    meta = generate(server, input_ids=[5, 6, 7], return_logprob=True, logprob_start_len=0)["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 5, None], [-0.006, 6, None], [-0.007, 7, None]] and "input_top_logprobs" not in meta
    meta = generate(server, input_ids=[5, 6, 7], return_logprob=True)["meta_info"]
    assert meta["input_token_logprobs"] == [] and meta["output_token_logprobs"]
    (*_, last) = generate(server, input_ids=[5, 6, 7], return_logprob=True, stream=True)
    assert last["meta_info"]["output_token_logprobs"] == meta["output_token_logprobs"]


def test_settings_reach_the_engine(server: Server) -> None:
    sampling = {"max_new_tokens": 50, "min_new_tokens": 1, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "stop": "the", "stop_token_ids": [9]}
    sampling |= {"sampling_seed": 5, "no_stop_trim": True, "ignore_eos": True, "repetition_penalty": 1.5, "logit_bias": {"3": 1.0}, "regex": "h.*"}
    answer = generate(server, text="hello", sampling_params=sampling)
    got = server.engine.seen[0][1]
    assert (got.max_tokens, got.min_tokens, got.top_k, got.top_p, got.min_p, got.stop) == (50, 1, 7, 0.25, 0.125, ["the"])
    assert (got.stop_token_ids, got.seed, got.ignore_eos, got.repetition_penalty, got.logit_bias) == ([9], 5, True, 1.5, {3: 1.0})
    assert got.structured_outputs is not None and got.structured_outputs.kind == "regex" and got.structured_outputs.text == "h.*"
    assert answer["text"] == "hello the" and answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "the"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "text"),
        ({"text": "x", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": [], "sampling_params": []}, "sampling_params"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [99999]}, "prompt"),
        ({"text": "x", "bogus": 1}, "bogus"),
        ({"text": "x", "sampling_params": {"max_new_tokens": 0}}, "sampling_params"),
        ({"text": "x", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "x", "sampling_params": {"bogus": 1}}, "sampling_params"),
        ({"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
        ({"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params"),
        ({"text": "x", "top_logprobs_num": 500}, "top_logprobs_num"),
    ],
)
def test_a_bad_field_is_named(server: Server, body: Any, named: str) -> None:
    status, raw = ask(server, "POST", "/generate", body)
    assert status == 400 and json.loads(raw)["error"]["message"].startswith(named), raw


def test_the_servers_own_routes(server: Server) -> None:
    info = json.loads(ask(server, "GET", "/get_model_info")[1])
    assert info["model_path"] == "tiny" and info["is_generation"] is True
    info = json.loads(ask(server, "GET", "/get_server_info")[1])
    assert info["version"] and info["max_model_len"] == 512 and info["internal_states"][0]["unfinished"] == 0
    assert ask(server, "GET", "/health_generate")[0] == 200 and server.engine.seen[-1][1].max_tokens == 1
    server.engine.is_alive = False
    assert ask(server, "GET", "/health_generate")[0] == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [{"text": "hello"}, {"text": ["hello", "one two"]}])
def test_abort_by_rid(server: Server, prompts: Any, stream: bool) -> None:
    """What there is is answered; a request of another name goes on."""
    engine = server.engine
    engine.reply, engine.delay = lambda prompt: "hello there " * 200, 0.02
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(generate, server, **prompts, rid="mine", stream=stream, sampling_params={"max_new_tokens": 400})]
        asked.append(threads.submit(generate, server, text="hello", rid="mine-0", sampling_params={"max_new_tokens": 60}))
        while len(engine.open) < (2 if prompts["text"] == "hello" else 3):
            time.sleep(0.01)
        assert ask(server, "POST", "/abort_request", {"rid": "another"})[0] == ask(server, "POST", "/abort_request", {"rid": "mine"})[0] == 200
        answers, other = asked[0].result(), asked[1].result()
    ended = answers if isinstance(answers, list) else [answers]
    reasons = [one["meta_info"]["finish_reason"] for one in ended if one["meta_info"]["finish_reason"]]
    assert [reason["type"] for reason in reasons] == ["abort"] * (1 if prompts["text"] == "hello" else 2)
    assert all(len(one["output_ids"]) < 400 for one in ended) and other["meta_info"]["finish_reason"]["type"] == "length"
    assert ask(server, "POST", "/abort_request", {})[0] == 400 and server.api.unfinished == 0


def test_flush_cache(server: Server) -> None:
    assert ask(server, "POST", "/flush_cache")[0] == ask(server, "GET", "/flush_cache")[0] == 200
    assert server.engine.commands == ["reset_prefix_cache"] * 2
