"""Embeddings: pooled hidden states against transformers, over chunks and cached prefixes, and the route through the official client."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server
from tiny import tiny_folder, tiny_model

from miniinfer import LLM, SamplingParams
from miniinfer.engine.text import Tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1, "page_size": 16}
PROMPTS = [[5, 9, 40, 7], list(range(3, 120)), [7], [(i * 37) % 320 for i in range(200)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("qwen3", tmp_path_factory.mktemp("models"))


def expected(prompt: list[int], pooling: str) -> torch.Tensor:
    with torch.no_grad():
        states = tiny_model("qwen3").model(torch.tensor([prompt])).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("budget", [512, 32])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_as_transformers_has_it(folder: Path, pooling: str, overlap: int, budget: int) -> None:
    """Also over chunks of a prompt, beside other requests, and when its prefix is in the cache."""
    llm = LLM(str(folder), max_num_batched_tokens=budget, max_num_seqs=4, overlap=overlap, **OPTIONS)
    llm.generate(PROMPTS, SamplingParams(max_tokens=2), use_tqdm=False)  # fills the prefix cache
    for _ in range(2):
        for output, prompt in zip(llm.embed(PROMPTS, use_tqdm=False, pooling=pooling, normalize=False), PROMPTS, strict=True):
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected(prompt, pooling), atol=2e-4, rtol=2e-4)
            assert output.prompt_token_ids == prompt
    llm.core.control("check")
    assert not llm.core.has_work


def test_preempted_means_are_right(folder: Path) -> None:
    llm = LLM(str(folder), max_num_batched_tokens=16, max_num_seqs=4, num_pages=22, max_model_len=320, **OPTIONS)
    long = [[(i * k) % 320 for i in range(150)] for k in (3, 7, 11)]
    for output, prompt in zip(llm.embed(long, use_tqdm=False, pooling="mean", normalize=False), long, strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected(prompt, "mean"), atol=2e-4, rtol=2e-4)


def test_a_prompt_may_fill_the_context(folder: Path) -> None:
    """No room is wanted for output; also in chunks, whose last one ends there, and of several such prompts at once."""
    llm = LLM(str(folder), max_num_batched_tokens=64, max_num_seqs=2, max_model_len=100, overlap=1, **OPTIONS)
    full = [[(i * k) % 320 for i in range(100)] for k in (3, 7, 11)]
    for pooling in ("mean", "last"):  # the latter finds all but a token in the cache
        for output, prompt in zip(llm.embed(full, use_tqdm=False, pooling=pooling, normalize=False), full, strict=True):
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected(prompt, pooling), atol=2e-4, rtol=2e-4)
    llm.core.control("check")
    with pytest.raises(ValueError, match="101 tokens are too many; the context holds 100"):
        llm.embed([[1] * 101])
    with pytest.raises(ValueError, match="leave no room for output"):
        llm.generate([full[0]], use_tqdm=False)


def test_lengths_and_errors_of_the_offline_api(folder: Path) -> None:
    llm = LLM(str(folder), **OPTIONS)
    (output,) = llm.embed([1, 2, 3], use_tqdm=False)
    assert math.hypot(*output.outputs.embedding) == pytest.approx(1)
    with pytest.raises(ValueError, match="pooling"):
        llm.embed([1, 2, 3], pooling="max")
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        llm.embed([[1], [320]])


# --------------------------------------------------------------------------------------------------------- the route


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_the_official_client(server: Server, client: openai.OpenAI) -> None:
    """It asks for base64 by itself."""
    answer = client.embeddings.create(model="tiny", input=["hello", "there"])
    assert [entry.index for entry in answer.data] == [0, 1] and answer.model == "tiny" and answer.object == "list"
    counts = [server.engine.tokenizer.encode(text) for text in ("hello", "there")]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, counts))
    for entry, ids in zip(answer.data, counts, strict=True):
        length = math.hypot(ids[-1], 2, -1)
        assert entry.embedding == pytest.approx([ids[-1] / length, 2 / length, -1 / length], rel=1e-6)
    assert client.embeddings.create(model="tiny", input="hello", encoding_format="float").data[0].embedding == pytest.approx(answer.data[0].embedding)


def test_token_ids_pooling_dimensions_and_encoding(server: Server) -> None:
    def ask(**fields: Any) -> list[Any]:
        answer = httpx.post(server.url + "/v1/embeddings", json=fields)
        assert answer.status_code == 200, answer.text
        return [entry["embedding"] for entry in answer.json()["data"]]

    assert ask(input=[4, 8], normalize=False) == [[8.0, 2.0, -1.0]]
    assert ask(input=[[4, 8], [3]], normalize=False, pooling="mean") == [[6.0, 2.0, -1.0], [3.0, 2.0, -1.0]]
    (short,) = ask(input=[4, 8], dimensions=2)
    assert short == pytest.approx([8 / math.hypot(8, 2), 2 / math.hypot(8, 2)])
    (text,) = ask(input=[4, 8], encoding_format="base64", normalize=False)
    assert struct.unpack("<3f", base64.b64decode(text)) == (8.0, 2.0, -1.0)
    assert ask(input=[[i] for i in range(1, 60)], normalize=False) == [[float(i), 2.0, -1.0] for i in range(1, 60)], "in the order given"


def test_a_prompt_as_long_as_the_context(server: Server) -> None:
    def ask(**fields: Any) -> httpx.Response:
        return httpx.post(server.url + "/v1/embeddings", json=fields)

    assert ask(input=[5] * 512).json()["usage"]["prompt_tokens"] == 512
    assert ask(input=[5] * 600, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 512
    longer = ask(input=[5] * 513)
    assert longer.status_code == 400 and longer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [-1]}, "input"),
        ({"input": [[5], [320]]}, "input"),
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [320]}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 4}, "dimensions"),
        ({"input": "x", "pooling": "cls"}, "pooling"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "stream": True}, "stream"),
    ],
)
def test_a_bad_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(server.url + "/v1/embeddings", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert server.api.unfinished == 0
