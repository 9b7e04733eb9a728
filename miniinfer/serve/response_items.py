"""From a chat answer's stream to the Responses API's items and events. Owns their shapes and order; routes and the store are responses.py's."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from miniinfer.data import CompletionOutput
from miniinfer.serve.answers import ChatAnswer, encode
from miniinfer.serve.parsers import whole_arguments
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.response_tools import TEXT, UNSEEN, Origin, flat, text_of
from miniinfer.serve.schemas import Shape

_CALLS = ("function_call", "custom_tool_call")


class ResponseUsage(Shape):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponseShape(Shape):
    """A response."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: ResponseUsage | None


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items, the client's or ours, as chat messages. What an assistant thought, said and called becomes one message."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's message that is being put together

    def assistant() -> dict[str, Any]:
        nonlocal turn
        if turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        return turn

    for item in items:
        kind = item["type"]
        text = _text(item.get("content"))
        if kind == "reasoning":
            if text:
                assistant()["reasoning_content"] = text
        elif kind == "function_call":
            function = {"name": flat(item["name"], item.get("namespace")), "arguments": item["arguments"]}
            assistant().setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "custom_tool_call":
            function = {"name": flat(item["name"], item.get("namespace")), "arguments": json.dumps({TEXT: item["input"]}, ensure_ascii=False)}
            assistant().setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif kind in ("function_call_output", "custom_tool_call_output"):
            turn = None
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif item["role"] == "assistant":
            if turn is not None and ("content" in turn or "tool_calls" in turn):
                turn = None
            assistant()["content"] = text
        else:
            turn = None
            messages.append({"role": item["role"], "content": text})
    return [m for m in messages if m["role"] != "assistant" or "content" in m or "tool_calls" in m]


def _text(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


class ResponseAnswer(ChatAnswer):
    """A chat answer told as a response. `begin` comes first; `ended` is called once the response is whole.

    It reads the chat's own stream events, so whatever chat can tell (content, reasoning, calls), this can."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.response: dict[str, Any] = {}
        self.ended: Callable[[], None] = lambda: None
        self._number = 0  # of the next event
        self.origins: dict[str, Origin] = {}  # tools that are not called what the chat calls them
        self._item: dict[str, Any] | None = None  # the output item that grows
        self._arguments = ""  # of a custom tool's call, which becomes its text at the end
        self._call = -1  # the chat's index of the call that it is

    def begin(self, asked: dict[str, Any]) -> None:
        """Makes the response, still without output. `asked`: the request's fields, which a response repeats."""
        text = asked["text"] or {}
        given = text.get("format") or {"type": "text"}
        names = "instructions max_output_tokens parallel_tool_calls previous_response_id store background temperature top_p user".split()
        names += ["max_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key"]
        self.response |= {name: asked[name] for name in names}
        self.response |= {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "queued" if asked["background"] else "in_progress",
            "model": self._about["model"],
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "tools": [tool for tool in asked["tools"] or [] if tool["type"] not in UNSEEN],
            "tool_choice": asked["tool_choice"] or "auto",
            "text": {"format": {k: v for k, v in given.items() if v is not None}, "verbosity": text.get("verbosity") or "medium"},
            "reasoning": {"effort": None, "summary": None} | {k: v for k, v in (asked["reasoning"] or {}).items() if k != "generate_summary"},
            "top_logprobs": asked["top_logprobs"] or 0,
            "truncation": asked["truncation"] or "disabled",
            "metadata": asked["metadata"] or {},
        }

    # ---------------------------------------------------------------------------------------- what service.py asks of it

    def add(self, delta: CompletionOutput) -> None:
        self._read(delta)

    def result(self) -> bytes:
        return encode(self.response)

    def event(self, delta: CompletionOutput) -> bytes:
        events: list[bytes] = []
        if not self._number:
            events += self._event("response.created", response=self.response) + self._event("response.in_progress", response=self.response)
        return b"".join(events + self._read(delta))

    def end(self) -> bytes:
        return b""

    def failure(self, error: ApiError) -> bytes:
        self.response["error"] = {"code": "rate_limit_exceeded" if error.status == 429 else "server_error", "message": error.message}
        return b"".join(self.close("failed"))

    # ------------------------------------------------------------------------------------------------- items and events

    def _read(self, delta: CompletionOutput) -> list[bytes]:
        events: list[bytes] = []
        for line in super().event(delta).split(b"\n\n"):
            for choice in json.loads(line[6:])["choices"] if line else ():
                events += self._take(choice)
        return events

    def _take(self, choice: dict[str, Any]) -> list[bytes]:
        """One chunk of the chat's stream."""
        delta, events = choice["delta"], []
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            events += self._open("reasoning")
            events += self._grow("response.reasoning_text.delta", thought)
        if (text := delta.get("content")) or (logprobs and not thought and not delta.get("tool_calls")):
            events += self._open("message")
            events += self._grow("response.output_text.delta", text or "", logprobs)
        for call in delta.get("tool_calls") or ():
            events += self._open_call(call)
            arguments = call["function"].get("arguments")
            assert self._item is not None
            if arguments and self._item["type"] == "custom_tool_call":
                self._arguments += arguments
            elif arguments:
                self._item["arguments"] += arguments
                events += self._event("response.function_call_arguments.delta", **self._place(), delta=arguments)
        if reason := choice.get("finish_reason"):
            if reason == "length":
                self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            if not self.response["output"]:
                events += self._open("message")
            events += self.close("incomplete" if reason == "length" else "completed")
        return events

    def _open(self, kind: str) -> list[bytes]:
        """Makes the growing item one of this kind, with one part of text."""
        if self._item is not None and self._item["type"] == kind:
            return []
        events = self._close()
        if kind == "message":
            self._item = {"id": f"msg_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "role": "assistant", "content": []}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self._item = {"id": f"rs_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self.response["output"].append(self._item)
        events += self._event("response.output_item.added", output_index=len(self.response["output"]) - 1, item=self._item)
        self._item["content"].append(part)
        return events + self._event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _open_call(self, call: dict[str, Any]) -> list[bytes]:
        if self._item is not None and self._item["type"] in _CALLS and self._call == call["index"]:
            return []
        events = self._close()
        self._call = call["index"]
        name, self._arguments = call["function"]["name"], ""
        origin = self.origins.get(name) or Origin(name, None, False)
        kind = _CALLS[origin.custom]
        self._item = {"id": f"{'ctc' if origin.custom else 'fc'}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "call_id": call["id"]}
        self._item |= {"name": origin.name, "input" if origin.custom else "arguments": ""}
        if origin.namespace is not None:
            self._item["namespace"] = origin.namespace
        self.response["output"].append(self._item)
        return events + self._event("response.output_item.added", output_index=len(self.response["output"]) - 1, item=self._item)

    def _grow(self, name: str, text: str, logprobs: list[Any] | None = None) -> list[bytes]:
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {}
        if part["type"] == "output_text":
            extra["logprobs"] = logprobs or []
            part["logprobs"] += logprobs or []
        return self._event(name, **self._place(), content_index=0, delta=text, **extra)

    def _close(self, status: str = "completed") -> list[bytes]:
        """Ends the growing item, if there is one."""
        item, place = self._item, self._place()
        if item is None:
            return []
        item["status"] = status
        if item["type"] in _CALLS and whole_arguments(item.get("arguments", self._arguments)) is None:
            item["status"] = "incomplete"
        if item["type"] == "custom_tool_call":
            item["input"] = text_of(self._arguments)
            events = self._event("response.custom_tool_call_input.delta", **place, delta=item["input"])
            events += self._event("response.custom_tool_call_input.done", **place, input=item["input"])
        elif item["type"] == "function_call":
            events = self._event("response.function_call_arguments.done", **place, arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            name = "response.output_text.done" if item["type"] == "message" else "response.reasoning_text.done"
            extra = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            events = self._event(name, **place, content_index=0, text=part["text"], **extra)
            events += self._event("response.content_part.done", **place, content_index=0, part=part)
        self._item = None
        return events + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def close(self, status: str) -> list[bytes]:
        """Ends the response: "completed", "incomplete", "failed" or "cancelled"."""
        events = self._close("completed" if status == "completed" else "incomplete")
        usage = self.usage()
        self.response["status"] = status
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0},
            "total_tokens": usage["total_tokens"],
        }
        self.ended()
        return events + self._event(f"response.{status}", response=self.response)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"] if self._item else None, "output_index": len(self.response["output"]) - 1}

    def _event(self, kind: str, /, **fields: Any) -> list[bytes]:
        number, self._number = self._number, self._number + 1
        return [b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, "sequence_number": number, **fields}) + b"\n\n"]
