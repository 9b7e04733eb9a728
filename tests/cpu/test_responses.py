"""The Responses API over a fake engine, through the official client: answers, events in order, the store, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer
from miniinfer.serve.response_items import messages_of
from miniinfer.serve.response_store import Store, Stored

TOOL: Any = {"type": "function", "name": "weather", "description": "the weather", "parameters": {"type": "object"}, "strict": None}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with Server(FakeEngine(tokenizer)) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.engine = running.api.engine = FakeEngine(running.engine.tokenizer, max_model_len=2048)
    return running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def prompt_of(server: Server) -> str:
    return str(server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False))


def test_an_answer(server: Server, client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="hello", instructions="be kind", temperature=0.5, metadata={"a": "b"})
    assert answer.status == "completed" and answer.output_text == "hello there" and answer.object == "response"
    assert answer.instructions == "be kind" and answer.metadata == {"a": "b"} and answer.temperature == 0.5 and answer.error is None
    (item,) = answer.output
    assert item.type == "message" and item.status == "completed" and item.role == "assistant"
    tokens = server.engine.seen[-1][0]
    assert answer.usage and answer.usage.input_tokens == len(tokens) and answer.usage.input_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert prompt_of(server) == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_events_come_in_openais_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="hello", stream=True))
    names = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len(deltas) > 1 and "".join(deltas) == "hello there"
    final: Any = events[-1]
    assert final.response.output_text == "hello there" and final.response.status == "completed"
    assert client.responses.retrieve(final.response.id).to_dict() == final.response.to_dict()


def test_the_clients_own_accumulator_agrees(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "hello there"


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_makes_it_incomplete(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        answer = list(client.responses.create(model="tiny", input="hello", max_output_tokens=1, stream=True))[-1].response  # type: ignore[union-attr]
    else:
        answer = client.responses.create(model="tiny", input="hello", max_output_tokens=1)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete" and answer.usage.output_tokens == 1


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="hello", top_logprobs=1, include=["message.output_text.logprobs"])
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr]
    assert "".join(entry.token for entry in part.logprobs if entry.token != "<|im_end|>") == "hello there"
    assert all(len(entry.top_logprobs) == 1 for entry in part.logprobs)


def test_sampling_fields_arrive(server: Server, client: openai.OpenAI) -> None:
    fields = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5, "stop_token_ids": [7], "ignore_eos": True}
    fields |= {"top_k": 9, "min_p": 0.125, "seed": 3, "skip_special_tokens": False, "include_stop_str_in_output": True}
    client.responses.create(model="tiny", input="hello", temperature=0.5, top_p=0.75, extra_body={**fields, "stop": "xyz"})
    params = server.engine.seen[-1][1]
    assert {name: getattr(params, name) for name in fields} == fields and params.stop == ["xyz"]
    assert (params.temperature, params.top_p) == (0.5, 0.75)


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_answer_goes_back(server: Server, client: openai.OpenAI, stream: bool) -> None:
    server.engine.reply = lambda _: "Let me look. " + CALL
    asked: Any = {"model": "tiny", "input": "weather?", "tools": [TOOL]}
    if stream:
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        names = [event.type for event in events]
        assert names.index("response.output_text.done") < names.index("response.function_call_arguments.delta")
        parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert "".join(parts) == done.arguments == '{"city": "Paris"}'
        answer = events[-1].response
    else:
        answer = client.responses.create(**asked)
    text, call = answer.output
    assert text.content[0].text.strip() == "Let me look." and call.type == "function_call" and call.name == "weather"
    assert call.status == "completed" and answer.status == "completed" and answer.tools[0].name == "weather"
    server.engine.reply = lambda _: "It is sunny."
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    last = client.responses.create(model="tiny", input=result, previous_response_id=answer.id, tools=[TOOL])
    assert last.output_text == "It is sunny." and last.previous_response_id == answer.id
    prompt = prompt_of(server)
    assert "weather?" in prompt and "Paris" in prompt and "<|im_start|>tool\nsunny<|im_end|>" in prompt
    whole: Any = [{"role": "user", "content": "weather?"}, *[item.to_dict() for item in answer.output], *result]
    client.responses.create(model="tiny", input=whole, tools=[TOOL])
    assert prompt_of(server) == prompt, "items sent back are the same conversation"


def test_a_conversation_goes_on(server: Server, client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="one", instructions="only here")
    second = client.responses.create(model="tiny", input=[{"role": "user", "content": "two"}], previous_response_id=first.id)
    client.responses.create(model="tiny", input="three", previous_response_id=second.id)
    prompt = prompt_of(server)
    assert [prompt.count(word) for word in ("one", "two", "three", "hello there", "only here")] == [1, 1, 1, 2, 0]
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items] == ["two"]  # type: ignore[union-attr]


def test_items_are_listed_by_pages(client: openai.OpenAI) -> None:
    given: Any = [{"role": "user", "content": f"number {i}"} for i in range(5)]
    answer = client.responses.create(model="tiny", input=given)
    listed: Any = list(client.responses.input_items.list(answer.id, order="asc", limit=2))
    assert [item.content[0].text for item in listed] == [f"number {i}" for i in range(5)]
    assert [i.id for i in client.responses.input_items.list(answer.id)] == [i.id for i in listed][::-1]


def test_what_is_not_stored_or_deleted_is_gone(client: openai.OpenAI) -> None:
    unkept = client.responses.create(model="tiny", input="hello", store=False)
    kept = client.responses.create(model="tiny", input="hello")
    client.responses.delete(kept.id)
    for id in (unkept.id, kept.id, "resp_none"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(id)
        with pytest.raises(openai.NotFoundError, match="previous_response_id|no response"):
            client.responses.create(model="tiny", input="x", previous_response_id=id)


def finished(client: openai.OpenAI, id: str) -> Any:
    end = time.monotonic() + 5
    while (answer := client.responses.retrieve(id)).status in ("queued", "in_progress") and time.monotonic() < end:
        time.sleep(0.02)
    return answer


def test_in_the_background(server: Server, client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="hello", background=True)
    assert answer.status in ("queued", "in_progress")
    assert finished(client, answer.id).output_text == "hello there"
    server.engine.delay = 0.2
    slow = client.responses.create(model="tiny", input="hello", background=True)
    assert client.responses.cancel(slow.id).status == "cancelled" == client.responses.retrieve(slow.id).status
    assert server.api.unfinished == 0
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(client.responses.create(model="tiny", input="x").id)


def test_the_engine_dies(server: Server, client: openai.OpenAI) -> None:
    server.engine.die_after = 2
    events = list(client.responses.create(model="tiny", input="hello", stream=True))
    last: Any = events[-1]
    assert last.type == "response.failed" and last.response.status == "failed" and last.response.error.code == "server_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input"),
        ({"input": "x", "conversation": "conv_1"}, "conversation"),
        ({"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": [{"role": "user", "content": "x", "more": 1}]}, "input"),
        ({"input": "x", "unknown": 1}, "unknown"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "tools": [{"type": "file_search"}]}, "tools"),
        ({"input": "x", "tools": [TOOL, TOOL]}, "tools"),
        ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": "x", "truncation": "left"}, "truncation"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_bad_field_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(server.url + "/v1/responses", json=fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param), answer.text


def test_what_the_assistant_did_becomes_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "b"},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": "c"},
        {"type": "message", "role": "assistant", "content": "d"},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert messages_of(items) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "hm", "content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_the_store_has_limits() -> None:
    store = Store(count=3, size=2100)

    def held(id: str, text: str = "") -> Stored:
        return Stored({"id": id, "status": "completed", "text": text, "output": [{"id": f"msg_{id}"}]}, [], [])

    for i in range(5):
        store.put(held(f"r{i}"))
    kept = []
    for i in range(5):
        try:
            kept.append(store.get(f"r{i}").response["id"])
        except Exception as e:
            assert "no response" in str(e)
    assert kept == ["r2", "r3", "r4"]
    assert store.item("msg_r4", "input.0") == {"id": "msg_r4"}
    with pytest.raises(Exception, match="no item 'msg_r0'"):
        store.item("msg_r0", "input.0")
    store.put(held("big", "x" * 1700))
    store.put(held("r9"))
    assert store.get("r9") and store.get("big")
    old = held("old")
    old.until = time.monotonic() - 1
    store.put(old)
    with pytest.raises(Exception, match="no response"):
        store.get("old")
