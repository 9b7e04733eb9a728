"""The agent of examples/ with its MCP server, against the model inside the package; and what goes wrong, against a scripted one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server
from serve_process import ROOT, ServerProcess

from miniinfer.engine.text import Tokenizer
from miniinfer.models.hub import BUNDLED

sys.path.insert(0, str(ROOT / "examples"))
from agent import Agent, McpClient, McpError

MCP = [sys.executable, str(ROOT / "examples" / "mcp_server.py")]


@pytest.fixture(scope="module")
def tools() -> Iterator[McpClient]:
    with McpClient(MCP) as client:
        yield client


def test_the_mcp_server_lists_and_calls_tools(tools: McpClient) -> None:
    listed = {tool["function"]["name"]: tool["function"] for tool in tools.list_tools()}
    assert listed["add"]["parameters"] == {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]
    }  # fmt: skip
    assert listed["get_weather"]["description"] and tools.server["name"] == "example"
    assert json.loads(tools.call_tool("add", {"a": 2, "b": 40})) == {"result": 42}
    assert tools.call_tool("get_weather", {"city": " "}) == "error: ValueError: city must not be empty"
    assert tools.call_tool("add", {"c": 1}).startswith("error: TypeError")
    with pytest.raises(McpError, match="no tool 'fly'"):
        tools.call_tool("fly", {})
    assert json.loads(tools.call_tool("add", {"a": 1, "b": 1})) == {"result": 2}


def test_an_mcp_server_that_ends_is_an_error() -> None:
    with pytest.raises(McpError, match="has ended"):
        McpClient([sys.executable, "-c", ""])


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="this checkout carries no bundled model")
def test_the_bundled_model_uses_tools(tools: McpClient, tmp_path: Path) -> None:
    running = ServerProcess("bundled", tmp_path / "server.log", "--dtype", "auto")
    try:
        for stream in (True, False):
            told: list[tuple[str, str]] = []

            def tell(kind: str, text: str, told: list[tuple[str, str]] = told) -> None:
                told.append((kind, text))

            with Agent(running.url, tools, stream=stream, tell=tell, temperature=0) as agent:
                assert agent.run("What is the weather in Paris?") == "In Paris it is sunny and 1 degrees."
                assert told[:2] == [("call", 'get_weather({"city": "Paris"})'), ("result", '{"temperature": 1, "condition": "sunny"}')]
                assert [message["role"] for message in agent.messages] == ["user", "assistant", "tool", "assistant"]
            with Agent(running.url, tools, stream=stream, temperature=0) as agent:
                assert "42" in agent.run("What is 12 + 30?")
                assert [m["tool_calls"][0]["function"]["name"] for m in agent.messages if "tool_calls" in m] == ["add"]
    finally:
        running.close()


@pytest.mark.parametrize("stream", [True, False])
def test_mistakes_are_told_to_the_model(tools: McpClient, tmp_path: Path, stream: bool) -> None:
    """Two calls at once, a function that there is not, and thoughts; then the model gives up."""

    def reply(prompt: str) -> str:
        if "no tool 'fly'" in prompt and '{"result": 3}' in prompt:
            return "<think>It cannot fly.</think>3, but I cannot fly."
        return '<think>Both.</think><tool_call>{"name": "fly"}</tool_call><tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    told: list[tuple[str, str]] = []
    engine = FakeEngine(Tokenizer.from_folder(save_tokenizer(tmp_path)), reply, max_model_len=4096)
    with Server(engine) as server, Agent(server.url + "/v1", tools, stream=stream, tell=lambda *event: told.append(event)) as agent:
        assert agent.run("Fly, and add 1 and 2.") == "3, but I cannot fly."
        thoughts = "".join(text for kind, text in told if kind == "thought")
        assert thoughts == "Both.It cannot fly."
        assert [text for kind, text in told if kind == "result"] == ["error: tools/call: bad parameters: there is no tool 'fly'", '{"result": 3}']
        engine.reply = lambda prompt: '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
        with pytest.raises(RuntimeError, match="no answer after 3 steps"):
            agent.run("again", max_steps=3)
        wrong: dict[str, Any] = {"temperature": -1}
        with Agent(server.url + "/v1", tools, stream=stream, **wrong) as refused, pytest.raises(RuntimeError, match="temperature"):
            refused.run("x")
