"""The grammar backend: llguidance. Turns what was asked into its grammars and follows outputs through them; nobody else imports it.

Run as a module it is the guard, a process of its own in which every grammar is compiled first: some that look harmless overflow the stack,
take gigabytes or take minutes, and then a guard dies, not the engine. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import llguidance
import msgspec
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from miniinfer.config import ConfigError
from miniinfer.data import COMPACT, StructuredOutputsParams
from miniinfer.engine.text import Tokenizer

# Free white space would let a model that is lost write blanks to the limit: a blank, or a line and its indentation.
WHITE_SPACE = {"whitespace_pattern": r"( |\n[ \t]{0,64})?"}
LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
MESSAGE = 300  # characters of llguidance's own words that are passed on
GUARD_BYTES = 512 << 20  # for a grammar, beyond what the tokenizer takes
ORPHAN_SECONDS = 30  # a guard that nobody stops ends itself


class Matcher:
    """One output on its way through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fresh(self) -> Matcher:
        """Another output's, at the same place."""
        return Matcher(self._matcher.deep_copy())

    def accept(self, token: int) -> bool:
        """Moves on by a token; False, for good, if the grammar does not allow it or has become too complex."""
        return bool(self._matcher.consume_token(token))

    @property
    def finished(self) -> bool:
        """Is there nothing left that could follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why it cannot go on; "" if it can."""
        return "" if not self._matcher.is_error() else " ".join(self._matcher.get_error().split())[:MESSAGE]


class Backend:
    """Compiles for one vocabulary: `vocab_size` is the model's, which may be padded beyond the tokenizer's."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: list[int]) -> None:
        """Reads the tokenizer of a folder. ConfigError if that cannot be used."""
        self._tokenizer = tokenizer = Tokenizer.from_folder(folder)
        try:
            self._vocabulary = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_token_ids or None)
        except Exception as e:
            raise ConfigError(f"the tokenizer in {folder} cannot be used for structured output: {e}") from None
        self._executor = llguidance.LLExecutor(num_threads=min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))

    def compile(self, wanted: StructuredOutputsParams) -> Matcher:
        """A matcher at the start of an output. ValueError, in words for whoever wrote the grammar."""
        try:
            made = llguidance.LLMatcher(self._vocabulary, self._grammar(wanted.kind, wanted), log_level=0, limits=LIMITS)
        except ValueError:
            raise
        except Exception as e:  # converters raise whatever they like
            raise ValueError(" ".join(str(e).split())[:MESSAGE]) from None
        matcher = Matcher(made)
        if made.is_error():
            raise ValueError(matcher.error)
        if made.is_stopped():
            raise ValueError("it allows no output but the empty one")
        return matcher

    def fill(self, matchers: list[tuple[Matcher, int]], masks: np.ndarray) -> None:
        """See grammar.py. Lets go of the GIL."""
        if len(matchers) == 1:
            matcher, row = matchers[0]
            matcher._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks.shape[1] * 4)
        else:
            pairs = [(m._matcher, row) for m, row in matchers]
            self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.shape[1] * 4, len(masks))

    def _grammar(self, kind: str, wanted: StructuredOutputsParams) -> str:
        make = llguidance.LLMatcher
        match kind:
            case "json":
                schema = _sound(json.loads(wanted.text))
                overrides = WHITE_SPACE if isinstance(schema, dict) and schema.get("x-guidance") != COMPACT else None
                return make.grammar_from_json_schema(json.dumps(schema), overrides=overrides)  # type: ignore[arg-type]
            case "json_object":
                return make.grammar_from_json_schema('{"type": "object"}', overrides=WHITE_SPACE)  # type: ignore[arg-type]
            case "regex":
                return make.grammar_from_regex(_unanchored(wanted.text))
            case "choice":
                return make.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in wanted.choice or ()))
            case "grammar":
                return make.grammar_from_lark(any_to_lark(wanted.text))
        return make.grammar_from_lark(_Tags(self._tokenizer).lark(json.loads(wanted.text)))


def _sound(schema: Any) -> Any:
    """llguidance 1.9 takes the bound itself for a number beyond an exclusive, integral bound if the range is narrower than one: there the bound moves
    in by a millionth of the range."""
    if isinstance(schema, list):
        return [_sound(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {k: v if k in ("const", "enum", "default", "examples") else _sound(v) for k, v in schema.items()}
    lows = [schema[k] for k in ("minimum", "exclusiveMinimum") if isinstance(schema.get(k), int | float)]
    highs = [schema[k] for k in ("maximum", "exclusiveMaximum") if isinstance(schema.get(k), int | float)]
    if lows and highs and 0 < max(highs) - min(lows) < 1:
        for key, inward in (("exclusiveMinimum", 1e-6), ("exclusiveMaximum", -1e-6)):
            if isinstance(schema.get(key), int | float) and float(schema[key]).is_integer():
                schema[key] += inward * (max(highs) - min(lows))
    return schema


def _unanchored(pattern: str) -> str:
    """The whole output has to match anyway, and llguidance knows no anchors there."""
    pattern = pattern.removeprefix("^")
    backslashes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and backslashes % 2 == 0 else pattern


# --------------------------------------------------------------------------------------------------- structural tags


class _Tags:
    """Structural tags as Lark: {"format": ...} as xgrammar has it, or the older {"structures": ..., "triggers": ...}."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.added_tokens
        self._ids = {token: id for id, token in added.items()}
        longest = sorted(self._ids, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest))) if longest else None
        self._plain = sorted(set(added) - tokenizer.special_ids)  # tags and the like, which free text may hold
        self._rules: list[str] = []

    def lark(self, tag: dict[str, Any]) -> str:
        """ValueError for one that is not understood."""
        if "structures" in tag:
            tags = [{"begin": s["begin"], "content": {"type": "json_schema", "json_schema": s["schema"]}, "end": s["end"]}
                    for s in _list(tag, "structures")]  # fmt: skip
            tag = {"format": {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}}
        start = self._any(_field(tag, "format", dict))
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])

    def _any(self, form: dict[str, Any]) -> str:
        match form.get("type"):
            case "const_string":
                return self._literal(_field(form, "value", str))
            case "json_schema":
                return _schema(_field(form, "json_schema", dict, bool))
            case "regex":
                return self._rule(f"/{llguidance.regex_to_lark(_unanchored(_field(form, 'pattern', str)), '')}/", "TERM")
            case "sequence":
                return " ".join(self._any(e) for e in _list(form, "elements"))
            case "or":
                return "(" + " | ".join(self._any(e) for e in _list(form, "elements")) + ")"
            case "any_text":
                return self._text(self._excluded(form))
            case "any_tokens":
                return f"<[^{','.join(str(self._id(token)) for token in _list(form, 'exclude_tokens', str))}]>*"
            case "tag":
                return self._tag(form, "")
            case "tags_with_separator":
                one = "(" + " | ".join(self._tag(t, "") for t in _list(form, "tags")) + ")"
                more = "" if form.get("stop_after_first") else f" ({self._literal(_field(form, 'separator', str))} {one})*"
                return one + more if form.get("at_least_one") else f"({one}{more})?"
            case "triggered_tags":
                return self._triggered(form)
        raise ValueError(f"structural_tag: a format of type {form.get('type')!r} is not supported")

    def _tag(self, form: dict[str, Any], trigger: str) -> str:
        """A tag without the trigger, which has been written already."""
        begin, end, content = _field(form, "begin", str)[len(trigger) :], _field(form, "end", str), _field(form, "content", dict)
        if content.get("type") == "any_text" and "max_tokens" in content:
            return f"{self._literal(begin)} {self._short(_field(content, 'max_tokens', int), end)}"
        if content.get("type") == "any_text":
            return f"{self._literal(begin)} {self._until(end, self._excluded(content))}"
        return f"{self._literal(begin)} {self._any(content)} {self._literal(end)}"

    def _triggered(self, form: dict[str, Any]) -> str:
        """Free text, and behind each trigger one of the tags that begin with it."""
        triggers, options = _list(form, "triggers", str), []
        tags, excluded = _list(form, "tags"), self._excluded(form)
        for trigger in triggers:
            own = [self._tag(t, trigger) for t in tags if _field(t, "begin", str).startswith(trigger)]
            if not trigger or not own:
                raise ValueError(f"structural_tag: no tag begins with the trigger {trigger!r}")
            options.append(f"{self._until(trigger, [*triggers, *excluded])} ({' | '.join(own)})")
        if not all(any(_field(t, "begin", str).startswith(trigger) for trigger in triggers) for t in tags):
            raise ValueError("structural_tag: a tag begins with none of the triggers")
        once, text = "(" + " | ".join(options) + ")", self._text([*triggers, *excluded])
        if form.get("stop_after_first"):
            return once if form.get("at_least_one") else f"({once} | {text})"
        return f"{once}{'+' if form.get('at_least_one') else '*'} {text}"

    def _until(self, end: str, others: list[str] | tuple[str, ...] = ()) -> str:
        """Text up to and with `end`, at the first place where that stands."""
        if end in self._ids:
            return f"{self._text([end, *others])} <[{self._ids[end]}]>"
        return self._rule(f"/(.|\\n)*/ {json.dumps(end)}", "until", "[lazy]")

    def _short(self, most: int, end: str) -> str:
        """At most so many tokens of text, without added tokens, and `end`, which is one: as text it would be part of the text before."""
        text = self._rule("/(.|\\n)*/", "thought", f"[max_tokens={most}]") if most > 0 else ""
        return f"{text} <[{self._id(end)}]>"

    def _id(self, token: str) -> int:
        if token not in self._ids:
            raise ValueError(f"structural_tag: {token!r} is not a token of its own here")
        return self._ids[token]

    def _excluded(self, form: dict[str, Any]) -> list[str]:
        """Added tokens that a form's free text must not have."""
        excluded = _list(form, "excludes", str) if form.get("excludes") else []
        for token in excluded:
            self._id(token)
        return excluded

    def _text(self, without: list[str] | tuple[str, ...]) -> str:
        """Any text; of the added tokens those that are neither special nor in `without`."""
        tokens = [i for i in self._plain if i not in {self._ids.get(w) for w in without}]
        term = self._rule("/(.|\\n)+/", "TERM")
        return f"({term} | <[{','.join(map(str, tokens))}]>)*" if tokens else f"({term})?"

    def _literal(self, text: str) -> str:
        """The text, its added tokens as the tokens that they are."""
        parts, at = [], 0
        for found in self._added.finditer(text) if self._added else ():
            parts += [json.dumps(text[at : found.start()], ensure_ascii=False), f"<[{self._ids[found[0]]}]>"]
            at = found.end()
        parts.append(json.dumps(text[at:], ensure_ascii=False))
        return " ".join(p for p in parts if p != '""')

    def _rule(self, body: str, name: str, attribute: str = "") -> str:
        name = f"{name}_{len(self._rules)}"
        self._rules.append(f"{name}{attribute}: {body}")
        return name


def _schema(schema: dict[str, Any] | bool) -> str:
    if isinstance(schema, dict):
        compact = schema.get("x-guidance") == COMPACT
        schema = {**_sound(schema), "x-guidance": COMPACT if compact else WHITE_SPACE}
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _field(form: dict[str, Any], name: str, *kinds: type) -> Any:
    if not isinstance(form, dict) or not isinstance(form.get(name), kinds):
        raise ValueError(f"structural_tag: '{name}' is missing, or is not of type {' or '.join(k.__name__ for k in kinds)}")
    return form[name]


def _list(form: dict[str, Any], name: str, kind: type = dict) -> list[Any]:
    found = _field(form, name, list)
    if not found or not all(isinstance(f, kind) for f in found):
        raise ValueError(f"structural_tag: '{name}' must be a list of {kind.__name__}, not empty")
    return list(found)


# ------------------------------------------------------------------------------------------------------------- guard


def guard() -> None:
    """Compiles what comes on stdin, a JSON line each, and answers with a JSON line: ["" or what is wrong, bytes it took]. The first line says for
    which vocabulary, and is answered when that has been read."""
    folder, vocab_size, eos_token_ids = json.loads(sys.stdin.readline())
    os.nice(5)  # tokens come first
    backend = Backend(Path(folder), vocab_size, eos_token_ids)
    limit = _memory()[0] + GUARD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    decode = msgspec.json.Decoder(StructuredOutputsParams).decode
    print('["", 0]', flush=True)
    for line in sys.stdin.buffer:
        before, error, made = _memory()[1], "", None
        signal.alarm(ORPHAN_SECONDS)
        try:
            made = backend.compile(decode(line))
        except ValueError as e:
            error = str(e) or "it is not valid"
        signal.alarm(0)
        print(json.dumps([error, max(0, _memory()[1] - before)]), flush=True)
        del made


def _memory() -> tuple[int, int]:
    """Bytes of addresses and of memory that this process has; 0 where the system does not say."""
    try:
        sizes = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 1 << 40, 0
    return int(sizes[0]) * resource.getpagesize(), int(sizes[1]) * resource.getpagesize()


if __name__ == "__main__":
    guard()
