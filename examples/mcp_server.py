"""A small MCP server over stdio: JSON-RPC 2.0, a message a line. Its tools are the functions below; needs the standard library only.

python examples/mcp_server.py        # speaks MCP on stdin and stdout; examples/agent.py starts it
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

PROTOCOL = "2025-06-18"
JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def get_weather(city: str) -> dict[str, Any]:
    """Get the current weather for a city"""
    if not city.strip():
        raise ValueError("city must not be empty")
    return {"temperature": sum(city.encode()) % 30, "condition": "sunny"}


def add(a: int, b: int) -> dict[str, int]:
    """Add two numbers"""
    return {"result": a + b}


TOOLS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (get_weather, add)}


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """A tool as `tools/list` shows it, from the function's own signature."""
    parameters = inspect.signature(function, eval_str=True).parameters
    properties = {name: {"type": JSON_TYPES[p.annotation]} for name, p in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": function.__name__, "description": function.__doc__, "inputSchema": schema}


def call(params: dict[str, Any]) -> dict[str, Any]:
    """`tools/call`. What goes wrong in a tool is an answer too: the model shall read it."""
    name, arguments = params["name"], params.get("arguments") or {}
    if name not in TOOLS:
        raise LookupError(f"there is no tool {name!r}")
    try:
        text, failed = json.dumps(TOOLS[name](**arguments)), False
    except Exception as e:
        text, failed = f"{type(e).__name__}: {e}", True
    return {"content": [{"type": "text", "text": text}], "isError": failed}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The response to a request: its result or an error."""
    try:
        match request["method"]:
            case "initialize":
                result = {"protocolVersion": PROTOCOL, "capabilities": {"tools": {}}, "serverInfo": {"name": "example", "version": "1"}}
            case "ping":
                result = {}
            case "tools/list":
                result = {"tools": [describe(function) for function in TOOLS.values()]}
            case "tools/call":
                result = call(request["params"])
            case method:
                return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32601, "message": f"there is no method {method}"}}
        return {"jsonrpc": "2.0", "id": request["id"], "result": result}
    except (LookupError, TypeError) as e:
        return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32602, "message": f"bad parameters: {e}"}}


if __name__ == "__main__":
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:  # the others are notifications, which nobody answers
            print(json.dumps(answer(message)), flush=True)
