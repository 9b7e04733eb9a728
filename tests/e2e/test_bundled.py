"""The model inside the package, served as `make serve` does: it speaks, and 256 clients at once are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serve_process import ServerProcess, stream, wait_for

from miniinfer.models.hub import BUNDLED

pytestmark = pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="this checkout carries no bundled model")
CLIENTS = 256


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess("bundled", tmp_path_factory.mktemp("log") / "server.log", "--dtype", "auto", "--num-threads", "2")
    yield running
    running.close()


def test_it_answers_in_words_and_ends_its_turn(bundled: ServerProcess) -> None:
    ask: Any = {"model": "bundled", "messages": [{"role": "user", "content": "Hello! What are you?"}]}
    answer = bundled.client().chat.completions.create(**ask, temperature=0, max_tokens=200)
    text = answer.choices[0].message.content or ""
    assert answer.choices[0].finish_reason == "stop" and len(text.split()) >= 3 and "MiniInfer" in text


def test_256_clients(bundled: ServerProcess) -> None:
    async def main() -> None:
        start = time.monotonic()
        prompts = [f"def add_{i}(a, b):" for i in range(CLIENTS)]
        fields: Any = {"max_tokens": 32, "ignore_eos": True, "temperature": 0}
        answers = await asyncio.gather(*[stream(bundled.port, {**fields, "prompt": prompt}) for prompt in prompts])
        seconds = time.monotonic() - start
        assert all(text.strip() for text, _ in answers)
        print(f"{CLIENTS} streams of 32 tokens in {seconds:.1f} s, {CLIENTS * 32 / seconds:.0f} tok/s")

    asyncio.run(main())
    assert wait_for(lambda: bundled.metric("vllm:num_requests_running") == 0 == bundled.metric("vllm:kv_cache_usage_perc"))
