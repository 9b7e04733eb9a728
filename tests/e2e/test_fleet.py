"""Two models on one port that take turns in memory, in real processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_process import ServerProcess
from tiny import tiny_folder

END = 2  # <|im_end|>


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


def test_a_version_is_replaced_under_load(tmp_path: Path) -> None:
    """Streams that run meanwhile end as they would have; none fails, and none waits for the new model to load."""
    for version, family in enumerate(("llama", "mixtral"), 1):
        save_tokenizer(tiny_folder(family, tmp_path, eos_token_id=END)).rename(tmp_path / f"chat-{version}")
    running = ServerProcess(tmp_path / "chat-1", tmp_path / "server.log", "--served-model-name", "chat:1", "--models-dir", str(tmp_path))
    try:
        client, root = running.client(), running.url.removesuffix("/v1")
        done = threading.Event()

        def work() -> list[tuple[str, str]]:
            answers = []
            while not done.is_set():
                answer = client.completions.create(model="chat", prompt="Hello", max_tokens=20, temperature=0)
                answers.append((answer.model, answer.choices[0].text))
            return answers

        with ThreadPoolExecutor(6) as pool:
            workers = [pool.submit(work) for _ in range(6)]
            assert httpx.post(root + "/models/register", json={"model": "chat:2", "path": "chat-2"}).is_success
            activated = httpx.post(root + "/models/activate", json={"model": "chat:2"}, timeout=60)
            assert activated.json()["status"]["value"] == "loaded"
            while len(running.engine_pids()) > 1:
                time.sleep(0.05)
            time.sleep(0.3)
            done.set()
            answers = [worker.result(60) for worker in workers]
        texts = {answer for part in answers for answer in part}
        assert {model for model, _ in texts} == {"chat:1", "chat:2"} and len(texts) == 2 and len({text for _, text in texts}) == 2
        for part in answers:
            models = [model for model, _ in part]
            assert models == sorted(models) and models[-1] == "chat:2"
    finally:
        running.close()
    assert "Traceback" not in running.log.read_text()
