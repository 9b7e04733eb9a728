"""/tokenize and /detokenize over a fake engine: vLLM's shapes, and one is the other's inverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    answer = httpx.post(server.url + path, json=body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("text", ["hello there", "", "naïve — ☃ 🙂", "<|im_start|>user\nhi<|im_end|>", "one " * 9000])
def test_there_and_back(server: Server, text: str) -> None:
    status, found = post(server, "/tokenize", prompt=text, return_token_strs=True)
    assert status == 200 and found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 512
    assert found["tokens"] == server.engine.tokenizer.encode(text)
    assert [server.engine.tokenizer.token_id(spelling) for spelling in found["token_strs"]] == found["tokens"]
    assert post(server, "/detokenize", tokens=found["tokens"]) == (200, {"prompt": text})


def test_a_conversation_is_what_the_model_gets(server: Server) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    status, found = post(server, "/tokenize", messages=messages)
    assert status == 200 and found["token_strs"] is None
    httpx.post(server.url + "/v1/chat/completions", json={"messages": messages})
    assert server.engine.seen[-1][0] == found["tokens"]
    shorter = post(server, "/tokenize", messages=messages, add_generation_prompt=False)[1]["tokens"]
    assert found["tokens"][: len(shorter)] == shorter != found["tokens"]
    begun = [*messages, {"role": "assistant", "content": "Sure,"}]
    text = post(server, "/tokenize", messages=begun, add_generation_prompt=False, continue_final_message=True)[1]["tokens"]
    assert server.engine.tokenizer.decode(text, skip_special_tokens=False).endswith("<|im_start|>assistant\nSure,")
    tool = {"type": "function", "function": {"name": "f"}}
    assert post(server, "/tokenize", messages=messages, tools=[tool])[1]["count"] > found["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"prompt": "x", "unknown": 1}, "unknown"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_a_bad_field_is_named(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = post(server, path, **body)
    assert status == 400 and answer["error"]["param"] == param


def test_without_a_tokenizer() -> None:
    with Server(FakeEngine(None)) as server:
        assert post(server, "/tokenize", prompt="x")[0] == 400
        assert post(server, "/detokenize", tokens=[1])[0] == 400


def test_another_model_is_refused(server: Server) -> None:
    assert post(server, "/tokenize", prompt="x", model="other")[0] == 404
    assert post(server, "/tokenize", prompt="x", model="tiny")[0] == 200
