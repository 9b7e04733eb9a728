"""Beam search against a naive one over the reference model, and through the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server
from tiny import tiny_folder, tiny_model

from miniinfer import LLM
from miniinfer.data import SequenceUpdate, TokenLogprobs
from miniinfer.engine.beam import BeamSearchParams
from miniinfer.engine.text import Tokenizer

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "num_threads": 1, "max_model_len": 64}
EOS = 17


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(tiny_folder("qwen3", tmp_path_factory.mktemp("models"), eos_token_id=EOS)), **OPTIONS)


def naive(prompt: list[int], width: int, limit: int, penalty: float, ignore_eos: bool) -> list[tuple[list[int], float]]:
    """The same search with whole forward passes and all tokens looked at."""
    model = tiny_model("qwen3", eos_token_id=EOS)

    def score(entry: tuple[list[int], float, bool]) -> float:
        ids, total, ended = entry
        return total / float(len(prompt) + len(ids) - ended) ** penalty

    beams: list[tuple[list[int], float, bool]] = [([], 0.0, False)]
    ended = []
    for _ in range(limit):
        grown = []
        for ids, total, _flag in beams:
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
            values, tokens = logprobs.topk(2 * width)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                if token == EOS and not ignore_eos:
                    ended.append((ids + [token], total + value, True))
                else:
                    grown.append((ids + [token], total + value, False))
        beams = sorted(grown, key=score, reverse=True)[:width]
    return [(ids, total) for ids, total, _ in sorted(ended + beams, key=score, reverse=True)[:width]]


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (4, 1.0), (4, 0.0), (10, 2.5)])
def test_finds_what_a_naive_search_finds(llm: LLM, width: int, penalty: float, ignore_eos: bool) -> None:
    prompts = [[5, 9, 40, 7], list(range(3, 30))]
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=penalty, ignore_eos=ignore_eos)
    for output, prompt in zip(llm.beam_search(prompts, params), prompts, strict=True):
        expected = naive(prompt, width, 6, penalty, ignore_eos)
        assert [o.token_ids for o in output.outputs] == [ids for ids, _ in expected]
        assert [o.cumulative_logprob for o in output.outputs] == pytest.approx([total for _, total in expected], abs=1e-3)
        for o in output.outputs:
            assert o.finish_reason == ("stop" if o.token_ids[-1] == EOS and not ignore_eos else "length")
            assert o.logprobs and sum(t[i].logprob for t, i in zip(o.logprobs, o.token_ids, strict=True)) == pytest.approx(o.cumulative_logprob)


def test_ends_where_the_context_does(llm: LLM) -> None:
    (output,) = llm.beam_search([[3] * 60], BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(o.token_ids) for o in output.outputs] == [4, 4] and {o.finish_reason for o in output.outputs} == {"length"}


def test_bad_parameters() -> None:
    for fields in ({"beam_width": 11, "max_tokens": 1}, {"beam_width": 0, "max_tokens": 1}, {"beam_width": 1, "max_tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            BeamSearchParams(**fields)


# ----------------------------------------------------------------------------------------------------------- the API


class Tree(FakeEngine):
    """Greedily "a" and then nothing good; but "b" and then "c" is likelier together."""

    def _update(self, id: str, token: int, finish: str | None, prompt: list[int] | None) -> SequenceUpdate:
        assert prompt is not None and self.tokenizer is not None
        a, b, c, d = (self.tokenizer.encode(letter)[0] for letter in "abcd")
        likely = {a: {c: -3.0, d: -3.1}, b: {c: -0.1, d: -2.0}}.get(prompt[-1], {a: -0.5, b: -1.0})
        ids = list(likely)
        return SequenceUpdate(id, [ids[0]], "length", logprobs=[TokenLogprobs([ids[0], *ids], [likely[ids[0]], *likely.values()], [1, 1, 2])])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(Tree(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_completions(server: Server, client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        beams = {"use_beam_search": True, **more.pop("beams", {})}
        return client.completions.create(model="tiny", prompt=["x", "y"], max_tokens=2, extra_body=beams, **more)

    assert [choice.text for choice in ask().choices] == ["ac", "ac"], "one beam is greedy"
    answer = ask(beams={"beam_width": 2})
    assert [choice.text for choice in answer.choices] == ["bc", "bc"] and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4 and answer.usage.prompt_tokens == 2
    two = ask(n=2, logprobs=1)
    assert [choice.text for choice in two.choices] == ["bc", "bd", "bc", "bd"]
    assert two.choices[0].logprobs.token_logprobs == [-1.0, -0.1]
    assert [choice.text for choice in ask(best_of=2).choices] == ["bc", "bc"]
    assert server.api.unfinished == 0


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2, extra_body={"use_beam_search": True, "beam_width": 2}
    )
    assert answer.choices[0].message.content == "bc"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.5}, "temperature"),
        ({"stop": "x"}, "stop"),
        ({"n": 11}, "n"),
        ({"n": 3, "beam_width": 2}, "beam_width"),
        ({"beam_width": 11}, "beam_width"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"use_beam_search": False, "beam_width": 2}, "beam_width"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
    ],
)
def test_what_a_search_cannot_have(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "use_beam_search": True, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
