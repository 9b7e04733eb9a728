"""Requests from files, for `bench serving --dataset`: conversations as in ShareGPT, plain prompts, and traces as Mooncake publishes them.

Owns the reading of lines and the prompts of traces, which hold no text: a trace names the blocks that a prompt is made of, and equal names become
equal text, so that prefixes are shared as they were in production. Lines whose keys are those of several kinds are read as the first that fits:

- {"timestamp": ms, "input_length": 100, "output_length": 10, "hash_ids": [4, 7]}, sent at its time; a block is 512 tokens
- {"messages": [{"role": ..., "content": ...}, ...]} or ShareGPT's {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}:
  all before the first answer is the prompt, and its answer's length the output's
- {"prompt": text or token ids}; this and the kinds above with "output_len" (or "max_tokens", "output_length") if the output's length is known
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from miniinfer.config import ConfigError

BLOCK = 512  # tokens that one of a trace's hashes stands for
CHARACTERS_PER_TOKEN = 4  # of English, about: the length of an answer that is given as text
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system"}
_LENGTHS = ("output_len", "max_tokens", "output_length")
SHORTEST = 16  # an output whose length is not known

Prompt = str | list[int] | list[dict[str, str]]


@dataclass(slots=True)
class Item:
    """One request: a prompt (text, token ids, or messages), the tokens of output, and when to send it, in seconds from the start."""

    prompt: Prompt
    output: int
    at: float | None = None


def read(path: str, words: list[str], as_tokens: bool, limit: int | None = None) -> list[Item]:
    """The first `limit` requests of a JSONL file, or of a JSON array, in order; in a trace of times by time. ConfigError that names file and line.

    `words` and `as_tokens`: what prompts of traces are made of, a word or a random token id for each token."""
    items = list(islice(_items(Path(path), words, as_tokens), limit))
    if not items:
        raise ConfigError(f"dataset: {path} holds no requests")
    timed = sum(item.at is not None for item in items)
    if 0 < timed < len(items):
        raise ConfigError(f"dataset: {path}: {timed} of {len(items)} requests have a timestamp; all must, or none")
    if timed:
        items.sort(key=lambda item: item.at or 0.0)
        first = items[0].at or 0.0
        for item in items:
            item.at = (item.at or 0.0) - first
    return items


def _items(path: Path, words: list[str], as_tokens: bool) -> Iterator[Item]:
    for where, entry in _entries(path):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"expected an object, found {type(entry).__name__}")
            yield _traced(entry, words, as_tokens) if "hash_ids" in entry else _written(entry)
        except ValueError as e:
            raise ConfigError(f"dataset: {where}: {e}") from None


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's value, or each element of an array, with its place."""
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from ((f"{path}: entry {i}", entry) for i, entry in enumerate(json.load(file), 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _decoded(f"{path}:{number}", line)
    except OSError as e:
        raise ConfigError(f"dataset: {path}: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"dataset: {path}: {e}") from None


def _decoded(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        raise ConfigError(f"dataset: {where}: not JSON ({e.msg} at column {e.colno})") from None


def _count(entry: dict[str, Any], name: str, least: int = 1) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"'{name}' must be a whole number from {least} on, found {value!r}")
    return value


# ------------------------------------------------------------------------------------------------------------- text


def _written(entry: dict[str, Any]) -> Item:
    turns = entry.get("messages", entry.get("conversations"))
    length = next((_count(entry, name) for name in _LENGTHS if entry.get(name) is not None), None)
    at = entry.get("timestamp")
    if at is not None and (not isinstance(at, int | float) or at < 0):
        raise ValueError(f"'timestamp' must be milliseconds, found {at!r}")
    seconds = None if at is None else at / 1e3
    if turns is not None:
        prompt, answer = _conversation(turns)
        return Item(prompt, length or max(SHORTEST, len(answer) // CHARACTERS_PER_TOKEN), seconds)
    given = entry.get("prompt")
    if isinstance(given, str) and given:
        return Item(given, length or SHORTEST, seconds)
    if isinstance(given, list) and given and all(type(token) is int and token >= 0 for token in given):
        return Item(given, length or SHORTEST, seconds)
    raise ValueError("needs 'conversations', 'messages', 'prompt' (text or token ids), or 'hash_ids' with its lengths")


def _conversation(turns: Any) -> tuple[list[dict[str, str]], str]:
    """The messages before the first answer to a user, and that answer ("" if there is none)."""
    if not isinstance(turns, list):
        raise ValueError("a conversation must be a list of turns")
    messages: list[dict[str, str]] = []
    for i, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        name, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if name not in _ROLES or not isinstance(text, str):
            raise ValueError(f"turn {i} needs a role or 'from' (one of {', '.join(_ROLES)}), and text in 'content' or 'value'")
        if _ROLES[name] == "assistant":
            if any(message["role"] == "user" for message in messages):
                return messages, text
            continue  # a conversation that was cut so that it begins with an answer
        messages.append({"role": _ROLES[name], "content": text})
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("the conversation has no turn of a user")
    return messages, ""


# ----------------------------------------------------------------------------------------------------------- traces


def _traced(entry: dict[str, Any], words: list[str], as_tokens: bool) -> Item:
    size, output = _count(entry, "input_length"), _count(entry, "output_length")
    at, hashes = _count(entry, "timestamp", 0), entry["hash_ids"]
    if not isinstance(hashes, list) or not all(type(name) is int for name in hashes):
        raise ValueError("'hash_ids' must be a list of whole numbers")
    if len(hashes) != -(-size // BLOCK):
        raise ValueError(f"{len(hashes)} hash_ids for an input_length of {size}; blocks of {BLOCK} tokens make {-(-size // BLOCK)}")
    tokens: list[Any] = []
    for name in hashes:
        rng = random.Random(name)
        tokens += [rng.randrange(256, 4096) for _ in range(BLOCK)] if as_tokens else rng.choices(words, k=BLOCK)
    return Item(tokens[:size] if as_tokens else " ".join(tokens[:size]), output, at / 1e3)
