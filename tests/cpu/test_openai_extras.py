"""Fields of vLLM's that its clients rely on, in chat and in completions: prompt log-probabilities, truncation, messages to be continued, usage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
import tokenizers
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server, read_events

from miniinfer.engine.text import Tokenizer

SAID = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_prompt_logprobs(server: Server, client: openai.OpenAI) -> None:
    ids = server.engine.tokenizer.encode("hello")
    for choice in client.completions.create(model="tiny", prompt=["hello", "hello"], extra_body={"prompt_logprobs": 1}).choices:
        scored = choice.model_extra["prompt_logprobs"]
        assert scored[0] is None and len(scored) == len(ids) and choice.logprobs is None
        assert scored[1] == {
            str(i): {"logprob": score, "rank": rank, "decoded_token": server.engine.tokenizer.token_text(i)}
            for i, score, rank in [(ids[1], -ids[1] / 1000, 1), (ids[1] + 1, -ids[1] / 1000 - 1, 2)]
        }
    chat = client.chat.completions.create(model="tiny", messages=SAID, extra_body={"prompt_logprobs": 0})  # type: ignore[arg-type]
    assert [len(entry or ()) for entry in chat.model_extra["prompt_logprobs"]] == [0] + [1] * (chat.usage.prompt_tokens - 1)
    assert client.completions.create(model="tiny", prompt="hello").choices[0].model_extra["prompt_logprobs"] is None
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: come at the end"):
        client.completions.create(model="tiny", prompt="hello", stream=True, extra_body={"prompt_logprobs": 1})


def test_prompt_logprobs_beside_an_echo(client: openai.OpenAI) -> None:
    """Each has as many alternatives as were asked for it."""
    for echoed, scored, shown in ((1, 2, (1, 3)), (2, 1, (3, 1))):  # more than asked for where the fake's second likeliest is its first alternative
        fields = {"prompt_logprobs": scored}
        choice = client.completions.create(model="tiny", prompt="hello", echo=True, max_tokens=0, logprobs=echoed, extra_body=fields).choices[0]
        assert (len(choice.logprobs.top_logprobs[1]), len(choice.model_extra["prompt_logprobs"][1])) == shown
    choice = client.completions.create(model="tiny", prompt="hello", echo=True, extra_body={"prompt_logprobs": 1}).choices[0]
    assert choice.logprobs is None and choice.text == "hellohello there"


def test_truncation(server: Server, client: openai.OpenAI) -> None:
    def prompt(fields: dict[str, Any], **more: Any) -> list[int]:
        client.completions.create(model="tiny", prompt=list(range(10, 20)), extra_body=fields, **more)
        return server.engine.seen[-1][0]

    assert prompt({"truncate_prompt_tokens": 4}) == [16, 17, 18, 19]
    assert prompt({"truncate_prompt_tokens": 4, "truncation_side": "right"}) == [10, 11, 12, 13]
    assert prompt({"truncate_prompt_tokens": 40}) == list(range(10, 20)) == prompt({"truncate_prompt_tokens": -1})
    long = list(range(10, 200)) * 4
    client.completions.create(model="tiny", prompt=long, max_tokens=12, extra_body={"truncate_prompt_tokens": -1})
    assert server.engine.seen[-1][0] == long[-500:]  # of a context of 512
    echoed = client.completions.create(model="tiny", prompt="one two", echo=True, extra_body={"truncate_prompt_tokens": 2}).choices[0].text
    assert echoed == server.engine.tokenizer.decode(server.engine.seen[-1][0]) + "hello there" and len(server.engine.seen[-1][0]) == 2
    client.embeddings.create(model="tiny", input=[[10, 11, 12], [13, 14]], extra_body={"truncate_prompt_tokens": 2})
    assert [seen[0] for seen in server.engine.seen[-2:]] == [[11, 12], [13, 14]]
    whole = client.chat.completions.create(model="tiny", messages=SAID, extra_body={"return_token_ids": True})  # type: ignore[arg-type]
    client.chat.completions.create(model="tiny", messages=SAID, extra_body={"truncate_prompt_tokens": 3})  # type: ignore[arg-type]
    assert server.engine.seen[-1][0] == whole.model_extra["prompt_token_ids"][-3:]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_the_last_message_goes_on(server: Server, echo: bool, stream: bool) -> None:
    messages = [*SAID, {"role": "assistant", "content": "I say "}]
    body = {"messages": messages, "continue_final_message": True, "echo": echo, "stream": stream, "return_token_ids": True}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if stream:
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in read_events(answer.content))
    else:
        text = answer.json()["choices"][0]["message"]["content"]
    assert text == "I say " * echo + "hello there"
    prompt = server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nI say ")


def test_what_cannot_go_on(client: openai.OpenAI) -> None:
    for fields, said in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message: the last message cannot go on"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "not the template's own variable"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.chat.completions.create(model="tiny", messages=SAID, extra_body=fields)  # type: ignore[arg-type]


def test_usage_in_every_event(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("chat/completions", {"messages": SAID}), ("completions", {"prompt": "hello"})):
        events = read_events(httpx.post(f"{server.url}/v1/{path}", json={**body, "stream": True, "stream_options": options}).content)
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert (
            counts == sorted(counts)
            and counts[0] == (path == "completions")
            and counts[-1] == counts[-2] == len(server.engine.tokenizer.encode("hello there")) + 1
        )
        assert all(event["usage"]["total_tokens"] == event["usage"]["prompt_tokens"] + count for event, count in zip(events, counts, strict=True))
        assert [event["choices"] for event in events[-1:]] == [[]]


def test_tokens_by_their_ids(server: Server, client: openai.OpenAI) -> None:
    ids, fields = [*server.engine.tokenizer.encode("hello there"), 2], {"return_tokens_as_token_ids": True}
    names = [f"token_id:{i}" for i in ids]
    assert client.completions.create(model="tiny", prompt="hello", logprobs=1, extra_body=fields).choices[0].logprobs.tokens == names
    chat = client.chat.completions.create(model="tiny", messages=SAID, logprobs=True, extra_body=fields)  # type: ignore[arg-type]
    assert [entry.token for entry in chat.choices[0].logprobs.content] == names


def test_token_ids_in_streams(server: Server) -> None:
    """The prompt's come once: in chat at the top of the first event, in completions in each choice's first."""
    made = [*server.engine.tokenizer.encode("hello there"), 2]

    def events(path: str, **body: Any) -> list[Any]:
        return read_events(httpx.post(f"{server.url}/v1/{path}", json={**body, "stream": True, "return_token_ids": True, "n": 2}).content)

    chat = events("chat/completions", messages=SAID)
    assert chat[0]["prompt_token_ids"] == server.engine.seen[-1][0] and not any("prompt_token_ids" in event for event in chat[1:])
    for echo in (False, True):
        completion = events("completions", prompt="hello", echo=echo)
        for index in (0, 1):
            mine = [event["choices"][0] for event in completion if event["choices"][0]["index"] == index]
            assert mine[0]["prompt_token_ids"] == server.engine.seen[-1][0] and not any("prompt_token_ids" in choice for choice in mine[1:])
            assert [i for choice in mine for i in choice.get("token_ids", ())] == made
    assert [i for event in chat if event["choices"][0]["index"] == 1 for i in event["choices"][0].get("token_ids", ())] == made


def test_a_bad_bias_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logit_bias: keys must be token ids, got 'bad1', 'bad2'"):
        client.chat.completions.create(model="tiny", messages=SAID, logit_bias={"bad1": 5, "7": 1, "bad2": 2})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ an end to reasoning


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a model whose reasoning is between two tokens."""
    folder = save_tokenizer(tmp_path_factory.mktemp("thinker"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    backend.save(str(folder / "tokenizer.json"))
    with Server(FakeEngine(Tokenizer.from_folder(folder))) as server:
        yield server


def test_thinking_token_budget(thinker: Server) -> None:
    """As a grammar that the engine follows: test_grammar.py has what it means there."""

    def asked(**fields: Any) -> Any:
        openai.OpenAI(base_url=thinker.url + "/v1", api_key="none", max_retries=0).chat.completions.create(
            model="tiny",
            messages=SAID,
            extra_body=fields,  # type: ignore[arg-type]
        )
        wanted = thinker.engine.seen[-1][1].structured_outputs
        return None if wanted is None else (wanted.field, wanted.text)

    field, text = asked(thinking_token_budget=7)
    assert field == "thinking_token_budget" and '"max_tokens":7' in text.replace(" ", "")
    field, text = asked(thinking_token_budget=7, response_format={"type": "json_object"})
    assert field == "response_format" and '"max_tokens":7' in text.replace(" ", "")
    assert [asked(thinking_token_budget=b) for b in (-1, None)] == [None, None]
    assert asked(thinking_token_budget=20, max_completion_tokens=20) is None  # which ends it anyhow
    assert asked(thinking_token_budget=7, chat_template_kwargs={"enable_thinking": False}) is None


def test_a_budget_for_reasoning_that_cannot_be_ended(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match="thinking_token_budget: the model's reasoning .reasoning_parser: think. is not between two"
    ) as e:
        client.chat.completions.create(model="tiny", messages=SAID, extra_body={"thinking_token_budget": 7})  # type: ignore[arg-type]
    assert e.value.param == "thinking_token_budget"


def test_anthropics_budget(thinker: Server) -> None:
    client = anthropic.Anthropic(base_url=thinker.url, api_key="none", max_retries=0)
    for on, grammar in (({"type": "enabled", "budget_tokens": 50}, True), ({"type": "adaptive"}, False), ({"type": "disabled"}, False)):
        client.messages.create(model="tiny", max_tokens=100, messages=SAID, thinking=on)  # type: ignore[call-overload]
        assert (thinker.engine.seen[-1][1].structured_outputs is not None) == grammar
