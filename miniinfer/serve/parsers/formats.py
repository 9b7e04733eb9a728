"""How each family of models writes tool calls and reasoning: the one table that parsers, grammars and `auto` read.

Owns facts only: data without side effects, importable from anywhere in serve/. How the text is read back is readers.py's and harmony.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from miniinfer.config import ConfigError

if TYPE_CHECKING:
    from miniinfer.engine.text import Tokenizer

Arguments = Literal["json", "qwen_xml", "glm_xml", "python"]


@dataclass(frozen=True)
class ToolFormat:
    """How an answer with calls is written: `begin`, then calls with `separator` between them, then `end`.

    One call is `before`, the function's name, `between`, the arguments, `after`. Arguments are a JSON object ("json"),
    `<parameter=KEY>\\nVALUE\\n</parameter>\\n` each ("qwen_xml"), `<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>\\n` each ("glm_xml"), or
    `KEY=LITERAL` with ", " between ("python"). In the XML forms a string is written as it is, any other value as JSON. `{index}` in `between` is the
    call's number. Parsers take more than this one spelling: other white space, and what models are seen to leave out."""

    name: str
    before: str
    between: str
    after: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    arguments: Arguments = "json"
    reader: str = ""  # the parser's name in readers.py, where it is not the format's own
    marks: tuple[str, ...] = ()  # a chat template with all of these writes calls so

    @property
    def parser(self) -> str:
        return self.reader or self.name


TOOL_FORMATS: dict[str, ToolFormat] = {
    f.name: f
    for f in (  # `auto` takes the first whose marks are in the template
        ToolFormat(
            "harmony",
            "<|channel|>commentary to=functions.",
            " <|constrain|>json<|message|>",
            "<|call|>",
            separator="<|start|>assistant",
            marks=("<|channel|>", "<|message|>"),
        ),
        ToolFormat(
            "deepseek_v3",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            separator="\n",
            end="<｜tool▁calls▁end｜>",
            reader="deepseek",
            marks=("<｜tool▁call▁begin｜>", "```json"),
        ),
        ToolFormat(
            "deepseek_v31",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            begin="<｜tool▁calls▁begin｜>",
            end="<｜tool▁calls▁end｜>",
            reader="deepseek",
            marks=("<｜tool▁call▁begin｜>",),
        ),
        ToolFormat(
            "kimi_k2",
            "<|tool_call_begin|>functions.",
            ":{index}<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            begin="<|tool_calls_section_begin|>",
            end="<|tool_calls_section_end|>",
            marks=("<|tool_calls_section_begin|>",),
        ),
        ToolFormat("mistral", "[TOOL_CALLS]", "[ARGS]", "", marks=("[TOOL_CALLS]", "[ARGS]")),
        ToolFormat(
            "mistral_list",
            '{"name": "',
            '", "arguments": ',
            "}",
            begin="[TOOL_CALLS] [",
            separator=", ",
            end="]",
            reader="mistral",
            marks=("[TOOL_CALLS]",),
        ),
        ToolFormat("glm45", "<tool_call>", "\n", "</tool_call>", separator="\n", arguments="glm_xml", marks=("<tool_call>", "<arg_key>")),
        ToolFormat(
            "qwen3_coder",
            "<tool_call>\n<function=",
            ">\n",
            "</function>\n</tool_call>",
            separator="\n",
            arguments="qwen_xml",
            marks=("<tool_call>", "<function="),
        ),
        ToolFormat("hermes", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", separator="\n", marks=("<tool_call>",)),
        ToolFormat(
            "llama3_json", '{"name": "', '", "parameters": ', "}", separator="; ", reader="llama3", marks=('"parameters"', "<|start_header_id|>")
        ),
        ToolFormat("pythonic", "", "(", ")", begin="[", separator=", ", end="]", arguments="python", reader="llama3", marks=("<|python_start|>",)),
        ToolFormat("json", '{"name": "', '", "arguments": ', "}", separator="\n"),
    )
}

# By config.json's model_type, for templates that say nothing of calls.
FAMILY_FORMATS = {
    "llama": "llama3_json",
    "mistral": "mistral_list",
    "mixtral": "mistral_list",
    "qwen2": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
}


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning is what stands between two tags at the beginning of an answer; a prompt may end with the first one already.

    "harmony" has channels instead, which its parser knows."""

    name: str
    begin: str
    end: str
    marks: tuple[str, ...] = ()

    def opened_by(self, prompt: str) -> bool:
        """Does a rendered prompt end within reasoning, so that the answer begins there."""
        return prompt.rstrip().endswith(self.begin)

    def closed_by(self, prompt: str) -> bool:
        """Does a rendered prompt end with reasoning that is over, so that the answer has none."""
        return prompt.rstrip().endswith(self.end)

    def ids(self, tokenizer: Tokenizer | None) -> tuple[int, int] | None:
        """The tags as tokens; None where they are written in several, or there is no tokenizer."""
        begin, end = (tokenizer.token_id(self.begin), tokenizer.token_id(self.end)) if tokenizer else (None, None)
        return None if begin is None or end is None else (begin, end)


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    f.name: f
    for f in (
        ReasoningFormat("harmony", "<|channel|>analysis<|message|>", "<|end|>", marks=("<|channel|>", "<|message|>")),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", marks=("[THINK]",)),
        ReasoningFormat("think", "<think>", "</think>", marks=("</think>",)),
    )
}

# Other servers' names for the same.
TOOL_ALIASES = {
    "deepseek_r1": "deepseek_v3",
    "glm47": "glm45",
    "gpt_oss": "harmony",
    "llama3": "llama3_json",
    "llama4": "pythonic",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": "harmony",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
}
REASONING_ALIASES = {
    "deepseek_r1": "think",
    "deepseek_v3": "think",
    "glm45": "think",
    "gpt_oss": "harmony",
    "kimi_k2": "think",
    "openai_gptoss": "harmony",
    "qwen3": "think",
}

TOOL_PARSERS = ("auto", "none", *TOOL_FORMATS, *TOOL_ALIASES)  # what --tool-call-parser may be
REASONING_PARSERS = ("auto", "none", *REASONING_FORMATS, *REASONING_ALIASES)  # what --reasoning-parser may be


def tool_format(name: str, template: str, family: str) -> ToolFormat | None:
    """The format of that name; "auto": the one that the chat template writes, or else the family's, or else plain JSON. ConfigError for no name."""
    _check("tool_call_parser", name, TOOL_PARSERS)
    if name == "none":
        return None
    if name != "auto":
        return TOOL_FORMATS[TOOL_ALIASES.get(name, name)]
    marked = (f for f in TOOL_FORMATS.values() if f.marks and all(mark in template for mark in f.marks))
    return next(marked, TOOL_FORMATS[FAMILY_FORMATS.get(family, "json")])


def reasoning_format(name: str, template: str) -> ReasoningFormat | None:
    """The format of that name; "auto": the one whose tags the chat template has, if any. ConfigError for no name."""
    _check("reasoning_parser", name, REASONING_PARSERS)
    if name == "none":
        return None
    if name != "auto":
        return REASONING_FORMATS[REASONING_ALIASES.get(name, name)]
    return next((f for f in REASONING_FORMATS.values() if all(mark in template for mark in f.marks)), None)


def _check(option: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ConfigError(f"{option}: {name!r} is not one of {', '.join(names)}")
