"""Two models on one port that take turns in memory, in real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from serve_process import ServerProcess


@pytest.fixture(scope="module", params=[(), ("--enable-sleep-mode",)], ids=["unloaded", "asleep"])
def turns(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = ServerProcess(
        folder, log, "--model", "talker=bundled,max_model_len=512", "--model-alias", "gpt-4=talker", *request.param, "--max-loaded-models", "1"
    )
    yield running
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


def test_taking_turns(turns: ServerProcess, folder: Path) -> None:
    client = turns.client()
    first, *_ = [model.id for model in client.models.list()]

    def ask(model: str, stream: bool) -> str:
        if not stream:
            return client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0).choices[0].text
        return "".join(
            c.choices[0].text for c in client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0, stream=True)
        )

    expected = {model: ask(model, False) for model in (first, "talker")}
    assert expected[first] != expected["talker"]
    with ThreadPoolExecutor(12) as pool:
        asked = [(first, "talker", "gpt-4")[i % 3] for i in range(24)]
        answers = list(pool.map(ask, asked, [i % 2 == 0 for i in range(24)]))
    assert answers == [expected["talker" if model == "gpt-4" else model] for model in asked]
    states = {model.id: model.model_dump()["status"]["value"] for model in client.models.list()}
    assert sorted(states.values()).count("loaded") in (1, 2) and turns.get("/health")[0] == 200  # 2: the alias, too
    assert httpx.get(turns.url.removesuffix("/v1") + "/api/ps").json()["models"][0]["model"] in (first, "talker")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        client.completions.create(model="talker", prompt="Once", max_tokens=600)


def test_killed_while_it_is_away(turns: ServerProcess) -> None:
    client = turns.client()
    first = client.models.list().data[0].id
    before = {
        model: client.completions.create(model=model, prompt="Hello", max_tokens=8, temperature=0).choices[0].text for model in (first, "talker")
    }
    for pid in turns.engine_pids():
        os.kill(pid, signal.SIGKILL)
    for model in (first, "talker", first):
        assert client.completions.create(model=model, prompt="Hello", max_tokens=8, temperature=0).choices[0].text == before[model]
