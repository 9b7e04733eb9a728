"""openai-python against a real server on a real (tiny, random) model: embeddings, responses, beam search, tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_process import ServerProcess

from miniinfer import LLM

MODEL = "tiny-qwen3"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), device="cpu", dtype="float32", num_threads=1)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_offline_ones(client: openai.OpenAI, llm: LLM, pooling: Any) -> None:
    texts = ["hello there", "one two three " * 60, "x"]
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body={"pooling": pooling})
    for entry, output in zip(answer.data, llm.embed(texts, use_tqdm=False, pooling=pooling), strict=True):
        assert entry.embedding == pytest.approx(output.outputs.embedding, abs=1e-4)
        assert math.hypot(*entry.embedding) == pytest.approx(1, abs=1e-5)


def test_a_response_is_the_chat_answer(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "hello there"}]
    chat = client.chat.completions.create(model=MODEL, messages=said, max_completion_tokens=20, temperature=0)
    response = client.responses.create(model=MODEL, input="hello there", max_output_tokens=20, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    events = list(client.responses.create(model=MODEL, input="hello there", max_output_tokens=20, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == response.output_text
    more = client.responses.create(model=MODEL, input="and?", previous_response_id=response.id, max_output_tokens=5, temperature=0)
    whole: Any = [*said, {"role": "assistant", "content": response.output_text}, {"role": "user", "content": "and?"}]
    again = client.chat.completions.create(model=MODEL, messages=whole, max_completion_tokens=5, temperature=0)
    assert more.output_text == again.choices[0].message.content and more.usage and again.usage
    assert more.usage.input_tokens == again.usage.prompt_tokens


def test_a_wide_beam_finds_something_at_least_as_likely(client: openai.OpenAI) -> None:
    def search(width: int) -> float:
        body = {"use_beam_search": True, "beam_width": width, "ignore_eos": True}
        answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=6, logprobs=0, extra_body=body)
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.token_logprobs and len(logprobs.token_logprobs) == 6
        return sum(value or 0.0 for value in logprobs.token_logprobs)

    greedy = client.completions.create(model=MODEL, prompt="one two", max_tokens=6, logprobs=0, temperature=0, extra_body={"ignore_eos": True})
    assert greedy.choices[0].logprobs and greedy.choices[0].logprobs.token_logprobs
    assert search(1) == pytest.approx(sum(value or 0.0 for value in greedy.choices[0].logprobs.token_logprobs), abs=1e-3)
    assert search(8) >= search(1) - 1e-3


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "one two", "max_tokens": 8, "temperature": 1.5, "seed": 3, "logprobs": 0}
    every = client.completions.create(**fields, n=6)
    likeliest = max(every.choices, key=lambda choice: sum(value or 0.0 for value in choice.logprobs.token_logprobs))  # type: ignore[union-attr]
    assert client.completions.create(**fields, best_of=6).choices[0].text == likeliest.text


def test_tokens_are_what_is_billed(server: ServerProcess, client: openai.OpenAI) -> None:
    root = server.url.removesuffix("/v1")
    found = httpx.post(root + "/tokenize", json={"prompt": "hello there, you"}).json()
    answer = client.completions.create(model=MODEL, prompt=found["tokens"], max_tokens=1)
    assert answer.usage and answer.usage.prompt_tokens == found["count"]
    assert httpx.post(root + "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hello there, you"}
