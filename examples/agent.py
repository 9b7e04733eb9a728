"""A small agent: a model behind an OpenAI-compatible API, and tools from an MCP server. It reasons, calls, reads the results, and answers.

    miniinfer serve &
    python examples/agent.py "What is the weather in Paris?"
    python examples/agent.py --url http://host:8000/v1 --mcp "python my_mcp_server.py" --no-stream "..."

Needs httpx beside the standard library. To use it in a program:

    with McpClient(["python", "examples/mcp_server.py"]) as tools, Agent("http://127.0.0.1:8000/v1", tools) as agent:
        print(agent.run("What is 12 + 30?"))
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

PROTOCOL = "2025-06-18"
EXAMPLE_SERVER = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('mcp_server.py')))}"

Message = dict[str, Any]


class McpError(RuntimeError):
    """The MCP server answered with an error, or not at all."""


class McpClient:
    """An MCP server as a child process, spoken to over its stdin and stdout, one request at a time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._requests = 0
        about = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": {"name": "agent", "version": "1"}}
        self.server = self._request("initialize", about)["serverInfo"]
        self._send({"method": "notifications/initialized"})

    def __enter__(self) -> McpClient:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the end of its input is the server's
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def list_tools(self) -> list[dict[str, Any]]:
        """All tools, in OpenAI's form."""
        tools: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            page = self._request("tools/list", {"cursor": cursor} if cursor else {})
            for tool in page["tools"]:
                function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": tool["inputSchema"]}
                tools.append({"type": "function", "function": function})
            cursor = page.get("nextCursor")
            if not cursor:
                return tools

    def call_tool(self, name: str, arguments: dict[str, Any]) -> str:
        """A tool's result as text; what went wrong in it is text as well."""
        result = self._request("tools/call", {"name": name, "arguments": arguments})
        text = "\n".join(part["text"] for part in result["content"] if part["type"] == "text")
        return f"error: {text}" if result.get("isError") else text

    def _request(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._requests += 1
        self._send({"id": self._requests, "method": method, "params": params})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if message.get("id") != self._requests:
                continue  # a notification
            if "error" in message:
                raise McpError(f"{method}: {message['error']['message']}")
            return dict(message["result"])
        raise McpError(f"{method}: the MCP server has ended")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        except OSError:
            raise McpError("the MCP server has ended") from None


class Agent:
    """Runs conversations in which the model may call tools. `messages` is the conversation so far."""

    def __init__(
        self,
        url: str,
        tools: McpClient,
        *,
        api_key: str = "none",
        system: str | None = None,
        stream: bool = True,
        tell: Callable[[str, str], None] = lambda kind, text: None,
        **options: Any,
    ) -> None:
        """`tell` gets what happens as it happens: ("thought" | "answer" | "call" | "result", text). `options` go into every request."""
        self._http = httpx.Client(base_url=url.rstrip("/"), headers={"authorization": f"Bearer {api_key}"}, timeout=600)
        self._tools, self._stream, self._tell, self._options = tools, stream, tell, options
        self._offered = tools.list_tools()
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def run(self, question: str, max_steps: int = 8) -> str:
        """The answer to a question, after as many calls as the model wants. RuntimeError if it does not come to an end."""
        self.messages.append({"role": "user", "content": question})
        for _ in range(max_steps):
            message = self._complete()
            self.messages.append(message)
            if not message.get("tool_calls"):
                return message["content"] or ""
            for call in message["tool_calls"]:
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": self._call(call["function"])})
        raise RuntimeError(f"no answer after {max_steps} steps")

    def _call(self, function: dict[str, str]) -> str:
        """The result of a call. A mistake of the model's is told to the model, which can mend it."""
        self._tell("call", f"{function['name']}({function['arguments']})")
        try:
            arguments = json.loads(function["arguments"])
            result = self._tools.call_tool(function["name"], arguments)
        except (json.JSONDecodeError, McpError) as e:
            result = f"error: {e}"
        self._tell("result", result)
        return result

    def _complete(self) -> Message:
        """The model's next message."""
        body = {"messages": self.messages, "tools": self._offered, "stream": self._stream, **self._options}
        if not self._stream:
            response = self._http.post("/chat/completions", json=body)
            _check(response)
            message = dict(response.json()["choices"][0]["message"])
            for kind, field in (("thought", "reasoning_content"), ("answer", "content")):
                if message.get(field):
                    self._tell(kind, message[field])
            return message
        message = {"role": "assistant", "content": ""}
        for delta in self._deltas(body):
            for kind, field in (("thought", "reasoning_content"), ("answer", "content")):
                if delta.get(field):
                    self._tell(kind, delta[field])
                    message[field] = message.get(field, "") + delta[field]
            for part in delta.get("tool_calls") or ():
                calls = message.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "type": "function", "function": {"name": part["function"]["name"], "arguments": ""}})
                calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments") or ""
        return message

    def _deltas(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._http.stream("POST", "/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"]


def _check(response: httpx.Response) -> None:
    if response.is_error:
        raise RuntimeError(f"the API answered {response.status_code}: {response.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--mcp", default=EXAMPLE_SERVER, help="command that starts an MCP server on stdio")
    parser.add_argument("--no-stream", action="store_true")
    options = parser.parse_args()

    last = ""

    def tell(kind: str, text: str) -> None:
        """Pieces of one kind go on one line."""
        nonlocal last
        if kind in ("call", "result") or kind != last:
            print(f"{chr(10) if last else ''}{kind}: ", end="")
        print(text, end="", flush=True)
        last = kind

    with (
        McpClient(shlex.split(options.mcp)) as tools,
        Agent(options.url, tools, api_key=options.api_key, stream=not options.no_stream, tell=tell, temperature=0) as agent,
    ):
        agent.run(options.question)
    print()


if __name__ == "__main__":
    main()
