"""A server on a tiny random model in fp32 with a small tokenizer, one for the session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_process import ServerProcess
from tiny import tiny_folder

END = 2  # <|im_end|>


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: it answers anything with noise, but greedy tokens are decided clearly."""
    made = tiny_folder("qwen3", tmp_path_factory.mktemp("models"), eos_token_id=END)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "temperature": 3.0, "top_k": 20}))
    return save_tokenizer(made)


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(folder, tmp_path_factory.mktemp("log") / "server.log")
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()
