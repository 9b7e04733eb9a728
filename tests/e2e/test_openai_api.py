"""openai-python against a real server on a real (tiny, random) model: what comes back is consistent with itself."""

from __future__ import annotations

import asyncio
import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_process import ServerProcess

MODEL = "tiny-qwen3"
HELLO: Any = [{"role": "system", "content": "You are a test."}, {"role": "user", "content": "hello there"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length") and choice.message.role == "assistant" and choice.message.content
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 12


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI, n: int) -> None:
    fields: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 40, "seed": 5, "n": n, "temperature": 1.2}
    whole = client.chat.completions.create(**fields)
    texts, reasons, usage = [""] * n, [""] * n, None
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.message.content for c in whole.choices] and reasons == [c.finish_reason for c in whole.choices]
    assert usage and whole.usage and usage.completion_tokens == whole.usage.completion_tokens
    assert n == 1 or len(set(texts)) == n, "samples of one request must differ"


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    def sample(seed: int | None) -> str:
        return client.completions.create(model=MODEL, prompt="one two", max_tokens=30, seed=seed, temperature=1.5).choices[0].text

    assert sample(11) == sample(11) != sample(12)
    assert sample(None) != sample(None)


def test_async_client(server: ServerProcess) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            asks = [client.completions.create(model=MODEL, prompt=f"number {i}", max_tokens=8, temperature=0) for i in range(8)]
            whole = [answer.choices[0].text for answer in await asyncio.gather(*asks)]
            streamed = []
            for i in range(8):
                stream = await client.completions.create(model=MODEL, prompt=f"number {i}", max_tokens=8, temperature=0, stream=True)
                streamed.append("".join([chunk.choices[0].text async for chunk in stream]))
            assert whole == streamed

    asyncio.run(main())


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, temperature=0, logprobs=True, top_logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and answer.usage and len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        top = [t.logprob for t in entry.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert entry.token == entry.top_logprobs[0].token and math.isclose(entry.logprob, top[0])  # greedy
        assert sum(map(math.exp, top)) <= 1 + 1e-4
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode("utf-8", "replace")
    shown = answer.choices[0].message.content or ""
    assert text.startswith(shown.rstrip("\ufffd")) or "<|" in text


def test_echo_scores_the_prompt_as_generation_did(client: openai.OpenAI) -> None:
    """The logprobs of generated tokens are found again when prompt and output are scored as a prompt."""
    fields: Any = {"model": MODEL, "temperature": 1, "logprobs": 1, "extra_body": {"return_token_ids": True, "ignore_eos": True, "top_k": 0}}
    made = client.completions.create(prompt=[10, 20, 30], max_tokens=10, seed=1, **fields).choices[0]
    ids = [10, 20, 30, *made.token_ids]  # type: ignore[attr-defined]
    again = client.completions.create(prompt=ids, max_tokens=0, echo=True, **fields)
    assert made.logprobs and again.choices[0].logprobs and again.usage and again.usage.completion_tokens == 0
    scored = again.choices[0].logprobs
    assert scored.token_logprobs and scored.token_logprobs[0] is None and scored.tokens and len(scored.tokens) == 13  # type: ignore[comparison-overlap]
    assert scored.token_logprobs[3:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)


def test_stop_string_cuts_the_text(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 60, "seed": 3, "temperature": 1.5, "extra_body": {"ignore_eos": True}}
    full = client.completions.create(**fields).choices[0].text
    stop = full[len(full) // 2 :][:3]
    cut = client.completions.create(**fields, stop=[stop, "never this"])
    assert cut.choices[0].text == full[: full.index(stop)] and cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**fields, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_logit_bias_and_stop_token_ids(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 5}
    forced = client.completions.create(**fields, logit_bias={"70": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [70] * 5  # type: ignore[attr-defined]
    stopped = client.completions.create(**fields, logit_bias={"70": 100}, extra_body={"stop_token_ids": [70], "min_tokens": 1})
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].stop_reason == 70  # type: ignore[attr-defined]


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "the quick brown fox jumps over the lazy dog and " * 4, "max_tokens": 6, "temperature": 0}
    first, second = client.completions.create(**fields), client.completions.create(**fields)
    assert first.choices[0].text == second.choices[0].text
    assert second.usage and second.usage.prompt_tokens_details and (second.usage.prompt_tokens_details.cached_tokens or 0) >= 16
    salted = client.completions.create(**fields, extra_body={"cache_salt": "mine"})
    assert salted.usage and salted.usage.prompt_tokens_details and not salted.usage.prompt_tokens_details.cached_tokens


def test_generation_config_is_the_default(client: openai.OpenAI) -> None:
    """temperature 3 and top_k 20 come from the checkpoint: the same seed gives the same text as when they are spelled out."""
    fields: Any = {"model": MODEL, "prompt": "hello", "max_tokens": 30, "seed": 9}
    silent = client.completions.create(**fields).choices[0].text
    assert silent == client.completions.create(**fields, temperature=3, extra_body={"top_k": 20}).choices[0].text
    assert silent != client.completions.create(**fields, temperature=0).choices[0].text


def test_errors_leave_the_server_as_it_was(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as overflow:
        client.completions.create(model=MODEL, prompt=[5] * 600)
    assert overflow.value.code == "context_length_exceeded" and "512" in overflow.value.message
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "yaml"})
    test_chat(client)


def test_a_full_context_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5] * 500, max_tokens=12, temperature=0, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length" and answer.usage and answer.usage.total_tokens == 512
    body: Any = {"ignore_eos": True}
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, extra_body=body)
    assert chat.choices[0].finish_reason == "length" and chat.usage and chat.usage.total_tokens == 512


def test_the_printed_curl_line_works(server: ServerProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    line = server.greeting.strip().splitlines()[-1]
    run = subprocess.run([*shlex.split(line), "-s"], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_model_list_and_metrics(server: ServerProcess, client: openai.OpenAI, folder: Path) -> None:
    assert [m.id for m in client.models.list()] == [folder.name] == [MODEL]
    test_chat(client)
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.metric("vllm:num_requests_running") == 0
