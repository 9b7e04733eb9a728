"""Structured output and forced tool calls through openai-python, on the bundled model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from serve_process import ServerProcess

from miniinfer.models.hub import BUNDLED

pytestmark = pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="this checkout carries no bundled model")

ASK: Any = {"model": "bundled", "messages": [{"role": "user", "content": "Describe a person as JSON."}], "max_tokens": 150}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=130)
    mood: Literal["good", "bad"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess("bundled", tmp_path_factory.mktemp("log") / "server.log", "--dtype", "auto")
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()


def streamed(client: openai.OpenAI, **fields: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**fields, stream=True) if c.choices)


def test_pydantic_models_are_filled_in(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(**ASK, response_format=Person, seed=3).choices[0]
    assert made.finish_reason == "stop" and isinstance(made.message.parsed, Person)


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    fields = {**ASK, "seed": 5, "response_format": {"type": "json_schema", "json_schema": {"name": "ab", "schema": schema, "strict": True}}}
    whole = client.chat.completions.create(**fields).choices[0].message.content or ""
    jsonschema.validate(json.loads(whole), schema)
    assert streamed(client, **fields) == whole


def test_every_spelling(client: openai.OpenAI) -> None:
    def said(**body: Any) -> str:
        answer = client.completions.create(model="bundled", prompt="Answer: ", max_tokens=60, seed=1, extra_body=body).choices[0]
        assert answer.finish_reason == "stop", body
        return answer.text

    assert re.fullmatch("[0-9]{3}-[a-f]{2}", said(guided_regex="[0-9]{3}-[a-f]{2}"))
    assert said(guided_choice=["yes", "no"]) in ("yes", "no")
    assert isinstance(json.loads(said(guided_json={"type": "integer", "minimum": 0, "maximum": 99})), int)
    assert re.fullmatch("(ab)+c", said(guided_grammar='root ::= "ab" ("ab" | "ab" "ab")? "c"'))
    assert said(structured_outputs={"choice": ["one"]}) == "one"
    assert said(structured_outputs={"regex": "x{4}"}) == "xxxx"
    answers = client.completions.create(model="bundled", prompt="A: ", n=3, max_tokens=20, extra_body={"guided_regex": "[a-z]{6}[0-9]"}).choices
    assert all(re.fullmatch("[a-z]{6}[0-9]", a.text) for a in answers) and len(answers) == 3


def test_some_tokens_only(client: openai.OpenAI) -> None:
    given = client.completions.create(model="bundled", prompt=["a", "b"], max_tokens=1, extra_body={"return_token_ids": True})
    ids = [choice.model_extra["prompt_token_ids"][-1] for choice in given.choices]  # type: ignore[index]
    answer = client.completions.create(model="bundled", prompt="x", max_tokens=7, extra_body={"allowed_token_ids": ids}).choices[0]
    assert re.fullmatch("[ab]{1,7}", answer.text)


def test_forced_tool_calls_are_valid(client: openai.OpenAI) -> None:
    def calls(choice: Any, **more: Any) -> Any:
        answer = client.chat.completions.create(**{**ASK, "seed": 2, **more}, tools=TOOLS, tool_choice=choice).choices[0]
        assert answer.message.tool_calls and not (answer.message.content or "").strip()
        for call in answer.message.tool_calls:
            schema = next(t["function"].get("parameters", {}) for t in TOOLS if t["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), schema)
        return answer.message.tool_calls

    for seed in range(4):
        assert {c.function.name for c in calls("required", seed=seed, parallel_tool_calls=False)} <= {"weather", "now"}
        (call,) = calls({"type": "function", "function": {"name": "weather"}}, seed=seed)
        assert call.function.name == "weather"
    asked: Any = {**ASK, "seed": 3, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    parts = [part for chunk in client.chat.completions.create(**asked, stream=True) for part in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments and len(parts) > 3  # in pieces, and the same


def test_a_bad_grammar_is_a_400_and_the_server_goes_on(client: openai.OpenAI) -> None:
    bad: list[tuple[str, Any]] = [
        ("guided_regex", "a("),
        ("guided_json", {"type": "object", "not": {}}),
        ("allowed_token_ids", [10**8]),
        ("guided_grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "a"'),
        ("structured_outputs", {"structural_tag": {"format": {"type": "magic"}}}),
    ]

    def ask(field: str, value: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="bundled", prompt="x", stream=field == "guided_json", extra_body={field: value})
        return refused.value

    with ThreadPoolExecutor(8) as threads:
        refusals = [threads.submit(ask, *each) for each in bad]
        fine = [threads.submit(lambda i: client.completions.create(model="bundled", prompt=f"{i}", max_tokens=8), i) for i in range(8)]
        assert [r.result().param for r in refusals] == [field for field, _ in bad]
        assert all(f.result().choices[0].text for f in fine)


def test_tags_in_free_text(client: openai.OpenAI) -> None:
    tag = {"type": "structural_tag", "structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}], "triggers": ["<n>"]}
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 30}, temperature=0, response_format=tag)  # type: ignore[call-overload]
    free = client.chat.completions.create(**{**ASK, "max_tokens": 30}, temperature=0)
    assert answer.choices[0].message.content == free.choices[0].message.content  # nothing triggers it
