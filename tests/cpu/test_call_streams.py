"""Tool calls through every API while they are written, with the official clients: early, the same as whole answers, and cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer

HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA: Any = {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}, "required": ["path", "text"]}
FUNCTION: Any = {"name": "write", "description": "Writes a file", "parameters": SCHEMA | {"additionalProperties": False}, "strict": True}
CHAT: Any = {"model": "tiny", "messages": HELLO, "tools": [{"type": "function", "function": FUNCTION}]}
RESPONSES: Any = {"model": "tiny", "input": "hello", "tools": [{"type": "function", **FUNCTION}]}
MESSAGES: Any = {"model": "tiny", "messages": HELLO, "tools": [{"name": "write", "description": "", "input_schema": SCHEMA}]}
FIRST, SECOND = {"path": "a.py", "text": 'print("é")\n' * 20}, {"path": "b", "text": ""}
REPLY = "Sure." + "".join(
    f'\n<tool_call>\n{{"name": "write", "arguments": {json.dumps(v, ensure_ascii=False)}}}\n</tool_call>' for v in (FIRST, SECOND)
)
CUT = 100  # tokens, which end within the first call


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.engine = running.api.engine = FakeEngine(running.engine.tokenizer, lambda prompt: REPLY, max_model_len=4096)
    return running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def calls_of(chunks: Any, n: int = 1) -> list[list[list[str]]]:
    """By choice and call: its name, and the pieces of its arguments."""
    calls: list[list[list[str]]] = [[] for _ in range(n)]
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or ():
                if part.function.name:
                    assert part.id and part.type == "function" and part.index == len(calls[choice.index])
                    calls[choice.index].append([part.function.name])
                if part.function.arguments:
                    calls[choice.index][part.index].append(part.function.arguments)
    return calls


def test_chat_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, n=2).choices
    for choice, calls in zip(whole, calls_of(client.chat.completions.create(**CHAT, n=2, stream=True), 2), strict=True):
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Sure."
        assert [call.function.arguments for call in choice.message.tool_calls or ()] == ["".join(pieces) for _, *pieces in calls]
        assert [json.loads("".join(pieces)) for _, *pieces in calls] == [FIRST, SECOND]
        assert len(calls[0]) > 5, "the arguments came in pieces"


def test_the_stream_helpers_events(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        events: list[Any] = list(stream)
        final = stream.get_final_completion().choices[0]
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert "".join(event.arguments_delta for event in deltas if event.index == 0) == done[0].arguments
    assert [event.parsed_arguments for event in done] == [FIRST, SECOND] and final.finish_reason == "tool_calls"
    assert any(isinstance(event.parsed_arguments, dict) and event.parsed_arguments.get("path") == "a.py" for event in deltas)


def test_responses_in_pieces(client: openai.OpenAI) -> None:
    events: list[Any] = list(client.responses.create(**RESPONSES, stream=True))
    names = [event.type for event in events]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta" and event.output_index == 1]
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(pieces) == done[0] and len(pieces) > 5 and [json.loads(text) for text in done] == [FIRST, SECOND]
    assert names.index("response.output_item.added", 4) < names.index("response.function_call_arguments.delta")
    calls = [item for item in client.responses.create(**RESPONSES).output if item.type == "function_call"]
    assert [call.arguments for call in calls] == done and {call.status for call in calls} == {"completed"}


def test_messages_in_pieces(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**MESSAGES, max_tokens=4000)
    with claude.messages.stream(**MESSAGES, max_tokens=4000) as stream:
        pieces: list[Any] = [event for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [block.model_dump(exclude={"id"}) for block in whole.content]
    assert [block.input for block in whole.content if block.type == "tool_use"] == [FIRST, SECOND] and final.stop_reason == "tool_use"
    assert len(pieces) > 5


def test_what_was_written_of_a_call_is_there_when_the_engine_dies(server: Server, client: openai.OpenAI) -> None:
    """That is, it went out before the call's end."""
    server.engine.die_after = CUT
    chunks: list[Any] = []
    with pytest.raises(openai.APIError):
        for chunk in client.chat.completions.create(**CHAT, stream=True):
            chunks.append(chunk)
    (((name, *pieces),),) = calls_of(chunks)
    assert name == "write" and "".join(pieces).startswith('{"path": "a.py", "text": "print(')


def test_cut_off_in_chat(client: openai.OpenAI) -> None:
    """As a client of OpenAI's knows it: the call is there, its arguments break off, and the finish reason says why."""
    choice = client.chat.completions.create(**CHAT, max_tokens=CUT).choices[0]
    chunks = list(client.chat.completions.create(**CHAT, max_tokens=CUT, stream=True))
    (((_, *pieces),),) = calls_of(chunks)
    assert [call.function.arguments for call in choice.message.tool_calls or ()] == ["".join(pieces)] and choice.message.content == "Sure."
    assert (
        json.dumps(FIRST, ensure_ascii=False).startswith("".join(pieces)) and choice.finish_reason == chunks[-1].choices[0].finish_reason == "length"
    )


def test_cut_off_by_a_stop_string(client: openai.OpenAI) -> None:
    """The call is not whole, so this does not end with "tool_calls"."""
    for stop, reason in (("print", "stop"), ("</tool_call>", "tool_calls")):
        choice = client.chat.completions.create(**CHAT, stop=stop).choices[0]
        assert choice.finish_reason == reason and len(choice.message.tool_calls or ()) == 1
        assert list(client.chat.completions.create(**CHAT, stop=stop, stream=True))[-1].choices[0].finish_reason == reason


def test_cut_off_in_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(**RESPONSES, max_output_tokens=CUT)
    (*_, last) = client.responses.create(**RESPONSES, max_output_tokens=CUT, stream=True)
    for response in (answer, last.response):  # type: ignore[union-attr]
        _, call = response.output
        assert response.status == call.status == "incomplete" and call.arguments.startswith('{"path": "a.py", "text": "print(')


def test_cut_off_in_messages(claude: anthropic.Anthropic) -> None:
    """What is complete of the input, as the client makes it of a stream."""
    whole = claude.messages.create(**MESSAGES, max_tokens=CUT)
    with claude.messages.stream(**MESSAGES, max_tokens=CUT) as stream:
        final = stream.get_final_message()
    for message in (whole, final):
        assert message.stop_reason == "max_tokens" and message.content[1].type == "tool_use" and message.content[1].input == {"path": "a.py"}


def test_ollama_has_whole_calls(server: Server) -> None:
    client = ollama.Client(server.url)
    whole = client.chat("tiny", HELLO, tools=CHAT["tools"])
    chunks = list(client.chat("tiny", HELLO, tools=CHAT["tools"], stream=True))
    for found in (whole.message.tool_calls or (), [call for chunk in chunks for call in chunk.message.tool_calls or ()]):
        assert [call.function.arguments for call in found] == [FIRST, SECOND]
    cut = client.chat("tiny", HELLO, tools=CHAT["tools"], options={"num_predict": CUT})
    assert cut.message.tool_calls is None and cut.done_reason == "length"
    assert (cut.message.content or "").startswith('Sure.{"name": "write", "arguments": {"path": "a.py", "text": "print(')
    parts = client.chat("tiny", HELLO, tools=CHAT["tools"], options={"num_predict": CUT}, stream=True)
    assert "".join(part.message.content or "" for part in parts) == cut.message.content


def test_a_broken_call_goes_back_to_the_model(server: Server) -> None:
    """What the model wrote wrong can be told to it, in a conversation that has its call as it was."""
    server.engine.reply = lambda prompt: '<tool_call>{"name": "write", "arguments": {"path": "a" "b"}}</tool_call>'
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (
        call["function"]["arguments"] == '{"path": "a" ' and choice["message"]["content"] == '"b"}}</tool_call>' and choice["finish_reason"] == "stop"
    )
    result = {"role": "tool", "tool_call_id": call["id"], "content": "error: no JSON"}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"messages": [*HELLO, choice["message"], result]}).status_code == 200
