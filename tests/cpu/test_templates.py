"""Chat templates that come with requests: refused unless trusted, rendered like the checkpoint's, and bounded in what they can cost."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from chat_tokenizer import TEMPLATE, save_tokenizer
from serve_fake import FakeEngine, Server

from miniinfer.engine.text import Tokenizer
from miniinfer.serve.protocol import MOST_TEMPLATE
from miniinfer.serve.templates import MOST_TEXT, TemplateProcess

HELLO: Any = [{"role": "user", "content": "hello"}]
LOUD = "{% for m in messages %}[{{ m.role | upper }}] {{ m.content }}{{ eos_token }}{% endfor %}"
LOUD += "{% if add_generation_prompt %}[ANSWER {{ mood }}]{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer), trust_request_chat_template=True) as running:
        yield running


def ask(server: Server, template: str, path: str = "/v1/chat/completions", **fields: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"messages": HELLO, "chat_template": template, **fields})
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def prompt(server: Server) -> str:
    return server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)


def test_a_request_brings_its_own(server: Server) -> None:
    assert ask(server, LOUD, chat_template_kwargs={"mood": "glad"})[0] == 200
    assert prompt(server) == "[USER] hello<|im_end|>[ANSWER glad]"
    status, made = ask(server, LOUD, "/tokenize", add_generation_prompt=False)
    assert status == 200 and server.engine.tokenizer.decode(made["tokens"], skip_special_tokens=False) == "[USER] hello<|im_end|>"


def test_the_same_template_gives_the_same(server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "\u00e9\U0001f98a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for fields in ({"messages": messages, "tools": tools}, {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": False}):
        assert ask(server, TEMPLATE, "/tokenize", **fields)[1] == ask(server, None, "/tokenize", **fields)[1]  # type: ignore[arg-type]


def test_nobody_is_trusted_by_default(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer)) as closed:
        for path in ("/v1/chat/completions", "/tokenize"):
            status, error = ask(closed, LOUD, path)
            assert status == 400 and error["error"]["param"] == "chat_template" and "--trust-request-chat-template" in error["error"]["message"]


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for %}", "line 1"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ 'x' * 5000000 }}", f"more than {MOST_TEXT}"),
        ("{{ 'x' * 100000000000 }}", "MemoryError"),
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "longer than"),
        ("x" * (MOST_TEMPLATE + 1), str(MOST_TEMPLATE)),
        ("", "at least 1"),
    ],
    ids=["syntax", "refusal", "attributes", "subclasses", "long", "memory", "time", "size", "empty"],
)
def test_what_a_template_may_not(server: Server, template: str, said: str) -> None:
    status, error = ask(server, template)
    assert status == 400 and said in error["error"]["message"], error
    assert ask(server, LOUD)[0] == 200, "the next one is none the worse"


def test_a_process_that_dies_or_is_left_is_replaced(tokenizer: Tokenizer) -> None:
    arguments = {"messages": HELLO, "tools": None, "add_generation_prompt": True, "continue_final_message": False, "variables": {}}

    async def body() -> None:
        renderer = TemplateProcess()
        try:
            task = asyncio.create_task(renderer.render("{{ 'left' }}" + "{% for a in range(90000) %}{{ a }}{% endfor %}", {}, arguments))
            while renderer._process is None:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await renderer.render("one", {}, arguments) == "one"
            assert renderer._process is not None
            first = renderer._process.pid
            assert await renderer.render("two", {}, arguments) == "two" and renderer._process.pid == first
            renderer._process.kill()
            await renderer._process.wait()
            assert await renderer.render("three", {}, arguments) == "three" and renderer._process.pid != first
        finally:
            await renderer.close()

    asyncio.run(body())
