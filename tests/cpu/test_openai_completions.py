"""Completions beyond the plain ones: a suffix (fill in the middle), and the best of several samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from miniinfer.data import SequenceUpdate, TokenLogprobs
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.infill import FORMATS, Format

NAMES = ["qwen", "starcoder", "codellama", "deepseek"]


def with_tokens(folder: Path, format: Format) -> Tokenizer:
    save_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in format])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


@pytest.fixture
def client(running: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_a_suffix_is_written_as_the_model_knows_it(running: Server, client: openai.OpenAI, tmp_path: Path, format: Format) -> None:
    tokenizer = with_tokens(tmp_path, format)
    running.engine = running.api.engine = FakeEngine(tokenizer)
    running.engine.info["vocab_size"] = tokenizer.vocab_size
    answer = client.completions.create(model="tiny", prompt="one two", suffix="four five", echo=True)
    before, between, after = (tokenizer.token_id(token) for token in format)
    expected = [before, *tokenizer.encode("one two"), between, *tokenizer.encode("four five"), after]
    assert running.engine.seen[-1][0] == expected
    assert answer.choices[0].text == "one twohello there" and answer.usage and answer.usage.prompt_tokens == len(expected)
    assert client.completions.create(model="tiny", prompt=["a", "b"], suffix="c").choices[1].text == "hello there"
    running.engine = running.api.engine = FakeEngine(tokenizer)


def test_a_suffix_without_the_tokens_is_refused(tmp_path: Path) -> None:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path)))) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no tokens for filling"):
            client.completions.create(model="tiny", prompt="a", suffix="b")
        with pytest.raises(openai.BadRequestError, match="a prompt that is a text"):
            client.completions.create(model="tiny", prompt=[1, 2], suffix="b")
        assert client.completions.create(model="tiny", prompt="a", suffix="").choices[0].text == "hello there"


class Uneven(FakeEngine):
    """Sample i of a request says token 10 + i, and the likeliest is neither the first nor the last."""

    LOGPROBS = (-3.0, -0.5, -2.0, -1.0)

    def _update(self, id: str, token: int, finish: str | None, prompt: list[int] | None) -> SequenceUpdate:
        sample = int(id.partition("#")[2] or 0)
        table = TokenLogprobs([10 + sample, 1], [self.LOGPROBS[sample], -9.0], [1, 2])
        return SequenceUpdate(id, [10 + sample], finish, logprobs=[table])


def test_the_best_of_several(running: Server, client: openai.OpenAI) -> None:
    running.engine = running.api.engine = Uneven(running.engine.tokenizer)

    def ask(**fields: Any) -> list[Any]:
        answer = client.completions.create(model="tiny", max_tokens=3, extra_body={"return_token_ids": True}, **fields)
        assert answer.usage and answer.usage.completion_tokens == 12 * (len(fields["prompt"]) if isinstance(fields["prompt"], list) else 1)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [json.loads(choice.model_dump_json()) for choice in answer.choices]

    (best,) = ask(prompt="x", best_of=4)
    assert best["token_ids"] == [11] * 3 and best["logprobs"] is None
    two = ask(prompt=["x", "y"], best_of=4, n=2, logprobs=0)
    assert [choice["token_ids"][0] for choice in two] == [11, 13, 11, 13]
    assert [choice["logprobs"]["token_logprobs"] for choice in two[:2]] == [[-0.5] * 3, [-1.0] * 3]


def test_what_cannot_be_best(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at least n"):
        client.completions.create(model="tiny", prompt="x", n=3, best_of=2)
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.completions.create(model="tiny", prompt="x", best_of=2, stream=True)
    assert list(client.completions.create(model="tiny", prompt="x", n=2, best_of=2, stream=True))
