"""What Anthropic's clients send that has no meaning of its own here: fields that are ignored, fields, tools and blocks that are refused with a word
on what to do instead, and blocks that are text in another form. The bodies themselves are anthropic.py's.
"""

from __future__ import annotations

from typing import Any

from miniinfer.serve.protocol import ApiError, without_foreign

# Billing, routing and diagnosis of a service, and hints that change no answer: `context_management` may take something out of a long conversation,
# and never does here.
IGNORED = (
    *("billing_policy", "context_management", "diagnostics", "fallback_credit_token", "fallbacks", "inference_geo", "speed"),
    *("user_profile_id", "workspace_id"),
)
_IGNORED_INSIDE = {"output_config": ("task_budget",), "thinking": ("block_binding",)}
_IGNORED_OF_TOOLS = ("allowed_callers", "defer_loading")  # the model is shown every tool, and calls it itself
_REFUSED = {
    "compaction": "not supported; ask for a summary in a request of your own",
    "container": "not supported; the server runs no code",
    "mcp_servers": "not supported; connect to them in the client, and offer what they have as tools",
    "thread": "not supported; send all messages, whose common beginning comes out of the cache",
}
_CODES = {"thread": "thread_unsupported_request"}  # upon which clients go on without
_CHANGING = "x-anthropic-billing-header:"  # begins a block of Claude Code's system prompt that is another one in every request


def known_fields(raw: Any) -> Any:
    """A request's body without what is ignored. ApiError 400 for what would change the answer and is not to be had."""
    if not isinstance(raw, dict):
        return raw
    try:
        body = without_foreign(raw, IGNORED, _REFUSED)
    except ApiError as e:
        e.code = _CODES.get(e.param or "", e.code)
        raise
    for name, ignored in _IGNORED_INSIDE.items():
        body |= {name: _without(body[name], ignored)} if name in body else {}
    if (format := body.pop("output_format", None)) is not None:  # as it was called before it had a place
        body["output_config"] = {"format": format, **(body.get("output_config") or {})}
    if isinstance(body.get("system"), list):
        body["system"] = [b for b in body["system"] if not (isinstance(b, dict) and str(b.get("text")).startswith(_CHANGING))]
    if isinstance(body.get("tools"), list):
        body["tools"] = [_tool(tool, i) for i, tool in enumerate(body["tools"])]
    return body


def _without(value: Any, names: tuple[str, ...]) -> Any:
    return {k: v for k, v in value.items() if k not in names} if isinstance(value, dict) else value


def _tool(tool: Any, index: int) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        field = f"tools.{index}"
        raise ApiError(
            400, f"{field}: {kind!r} is not to be had here; offer a tool of your own, with name, description and input_schema", param=field
        )
    return _without(tool, _IGNORED_OF_TOOLS)


def plain_block(block: Any) -> Any:
    """A block of a message, as text if that is what it holds. ValueError for what only a model that sees could read."""
    if not isinstance(block, dict):
        return block
    kind: Any = block.get("type")
    source: Any = block.get("source")
    form = {"text": "data", "content": "content"}.get(str(source.get("type"))) if isinstance(source, dict) else None
    if kind == "image" or (kind == "document" and form is None):
        raise ValueError(f"{kind}: the model reads text only; give it as a block of type 'text'")
    if kind == "document":
        parts = [block.get("title"), block.get("context"), *_texts(source.get(form))]
    elif kind == "search_result":
        parts = [block.get("title"), source, *_texts(block.get("content"))]
    elif kind == "tool_reference":
        parts = [f"The tool {block.get('tool_name')} can be used."]
    else:
        return _without(block, ("toolset_name",))
    return {"type": "text", "text": "\n".join(str(part) for part in parts if part), "cache_control": block.get("cache_control")}


def _texts(content: Any) -> list[Any]:
    if not isinstance(content, list):
        return [content]
    return [plain_block(block).get("text") for block in content if isinstance(block, dict)]
