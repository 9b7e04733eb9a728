"""Text to token ids and back: the tokenizer of a checkpoint folder, its chat template, and incremental detokenization.

Owns nothing of requests: stop strings and outputs live in output.py. Imports neither torch nor transformers; the API process loads it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from miniinfer.config import ConfigError, read_json

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "render_chat"]

_CUT = "\ue000cut\ue001"  # marks where a message that is to be continued ends; of characters that no text has
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer: ids, bytes and text. Safe to use from several threads, `encode` releases the GIL.

    Two kinds of vocabulary are understood, byte-level BPE (Llama 3, Qwen) and SentencePiece's with or without byte fallback
    (Llama 2, Mistral, Mixtral); in both a token is a fixed string of bytes, which is all that detokenization needs to know."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        """`special_tokens` by role ("eos_token": "</s>"), `chat_templates` by name ("default", "tool_use"), `source` for error messages."""
        self._backend = backend
        self._spell = _Speller(backend, source)
        self._bytes: dict[int, bytes] = {}
        # What `skip_special_tokens` leaves out:
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.special_tokens = special_tokens or {}
        self.chat_templates = {name: ChatTemplate(text) for name, text in (chat_templates or {}).items()}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @staticmethod
    def from_folder(folder: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template (`chat_template` names a file to use instead of the folder's).

        Raises ConfigError naming the file that is missing or cannot be read."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give --tokenizer a folder that has one, or --skip-tokenizer-init for token ids only")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception for whatever it does not understand
            raise ConfigError(f"{path}: not a tokenizer that the tokenizers library can read ({e})") from None
        backend.no_padding()
        backend.no_truncation()
        settings_path = folder / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        _add_missing_tokens(backend, settings.get("added_tokens_decoder") or {}, str(settings_path))
        special = {name: _content(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
        return Tokenizer(backend, special, _read_templates(folder, settings, chat_template), str(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A rendered chat already spells out its special tokens: pass False for it. ValueError for lone surrogates."""
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise ValueError("prompt: must be valid text, without unpaired surrogates") from None

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        return [list(e.ids) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of whole sequences. Ids outside the vocabulary stand for nothing."""
        return str(self._backend.decode([i for i in ids if 0 <= i < 2**32], skip_special_tokens=skip_special_tokens))

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token adds to a text, perhaps only a part of a character; a special token spells its name. b"" outside the vocabulary."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._spell(id)
        return found

    def token_text(self, id: int) -> str:
        """`token_bytes` for showing, with U+FFFD for a part of a character."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def spelling(self, id: int) -> str:
        """A token as the vocabulary spells it, for instance with Ġ for a space."""
        return self._backend.id_to_token(id) or ""

    @property
    def added_tokens(self) -> dict[int, str]:
        """The tokens that stand beside the trained vocabulary: special ones, tags and the like."""
        return {int(i): token.content for i, token in self._backend.get_added_tokens_decoder().items()}

    def to_json(self) -> str:
        """The tokenizer as tokenizer.json has it, with what tokenizer_config.json adds."""
        return str(self._backend.to_str())

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary (for instance "<|im_end|>"), None if there is none."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of text; the ids that end a generation are the model's (ModelConfig.eos_token_ids)."""
        return self._id_of("eos_token")

    def _id_of(self, role: str) -> int | None:
        return self.token_id(self.special_tokens[role]) if role in self.special_tokens else None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, to be encoded with add_special_tokens=False. `variables` go to the template (`enable_thinking`).
        With `continue_final_message` it ends where the last message's content does, and the model writes the rest of that message.

        Content given as OpenAI's list of text parts is joined and a tool call's JSON arguments are parsed, as templates expect. Raises
        ValueError, saying what is wrong, for a conversation that the template refuses and where there is no template."""
        template = self.chat_templates.get("tool_use") if tools else None
        template = template or self.chat_templates.get("default")
        if template is None:
            raise ValueError("messages: the model has no chat template; use plain completions, or start with --chat-template FILE")
        return render_chat(template, self.special_tokens, messages, tools, add_generation_prompt, continue_final_message, variables)


# ------------------------------------------------------------------------------------------------------------ loading


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _add_missing_tokens(backend: tokenizers.Tokenizer, listed: dict[str, Any], source: str) -> None:
    """Some checkpoints name added tokens only in tokenizer_config.json, or only there as special."""
    known = backend.get_added_tokens_decoder()
    for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
        fields = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
        if int(key) in known and known[int(key)].special == fields.get("special", False):
            continue
        backend.add_tokens([tokenizers.AddedToken(token["content"], **fields)])
        if backend.token_to_id(token["content"]) != int(key):
            raise ConfigError(f"{source}: the added token {token['content']!r} has id {key} there, but tokenizer.json gives it another")


def _read_templates(folder: Path, settings: dict[str, Any], file: str | Path | None) -> dict[str, str]:
    """Chat templates by name: from an explicit file, chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    try:
        if file is not None:
            return {"default": Path(file).read_text(encoding="utf-8")}
        found = settings.get("chat_template") or {}
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
        elif isinstance(found, str):
            found = {"default": found}
        if (folder / "chat_template.json").exists():
            found = {**found, "default": read_json(folder / "chat_template.json")["chat_template"]}
        for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
            found = {**found, extra.stem: extra.read_text(encoding="utf-8")}
        if (folder / "chat_template.jinja").exists():
            found = {**found, "default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
        return found
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"chat_template: {file or folder} cannot be read ({e})") from None
    except (KeyError, TypeError) as e:
        raise ConfigError(f"{folder}: the chat template in its JSON files is misshapen ({e!r})") from None


# --------------------------------------------------------------------------------------------------- tokens as bytes


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: visible Latin-1 stands for itself, the rest is moved to U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


class _Speller:
    """id -> bytes, from the decoder that tokenizer.json declares. ConfigError for one whose tokens are not fixed strings of bytes."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str) -> None:
        self._id_to_token = backend.id_to_token
        self._replace: list[tuple[str, str]] = []
        self._alphabet: dict[str, int] | None = None
        self._byte_fallback = False
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
        self._read(decoder, source)

    def _read(self, decoder: dict[str, Any], source: str) -> None:
        match decoder:
            case {"type": "Sequence", "decoders": parts}:
                for part in parts:
                    self._read(part, source)
            case {"type": "ByteLevel"}:
                self._alphabet = byte_alphabet()
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._replace.append((old, new))
            case {"type": "Metaspace", "replacement": mark}:
                self._replace.append((mark, " "))
            case {"type": "Fuse"} | {"type": "Strip", "stop": 0}:  # Strip takes a space off the start of a text: an output is never at the start
                pass
            case _:
                raise ConfigError(f"{source}: a decoder of type {decoder['type']} is not supported; byte-level and SentencePiece ones are")

    def __call__(self, id: int) -> bytes:
        token = self._id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:
            return b""
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._alphabet is not None and all(c in self._alphabet for c in token):
            return bytes(self._alphabet[c] for c in token)
        return token.encode("utf-8", "replace")


class Detokenizer:
    """The text of one output, piece by piece as its tokens arrive, in O(1) a token.

    A piece never ends within a character and is never taken back. The pieces together are what a decode of prompt and output adds to that
    of the prompt, so a first word keeps its leading space. An invalid byte becomes U+FFFD as soon as it is known to be invalid;
    the bytes of a character that is still incomplete when the output ends are not shown."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        self._bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(prompt[-4:])  # the output may complete a character that the prompt ends within: at most three bytes of it

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete. Ids outside the vocabulary stand for nothing."""
        return self._utf8.decode(b"".join([self._bytes(i) for i in ids if i not in self._skip]))


# ----------------------------------------------------------------------------------------------------- chat templates


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what a model wrote, for training; for a prompt it is its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which a model was never shown."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> jinja2.Environment:
    """Templates come with checkpoints, that is from strangers: they run in the sandbox and cannot change what they are given."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class ChatTemplate:
    """A chat template in jinja as Hugging Face checkpoints carry it, compiled when it is first used."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Some tell a message of calls alone by its content being null, to most of the others null is a text, "None".
        self.tests_for_null = re.search(r"content['\"\]]*\s+is\s+(not\s+)?none", text) is not None
        self.wants_thinking = re.search(r"\.thinking\b|['\"]thinking['\"]", text) is not None  # gpt-oss's name for reasoning
        self._compiled: jinja2.Template | None = None

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The conversation as text. ValueError with the template's or jinja's own words if that is impossible."""
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.text)
            return self._compiled.render(messages=messages, **variables)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f"chat_template: line {e.lineno}: {e.message}") from None
        except Exception as e:  # whatever a template does to these messages: its refusals, and its own faults
            said = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
            raise ValueError(f"messages: the chat template refuses them: {said}") from None


def render_chat(
    template: ChatTemplate,
    special_tokens: dict[str, str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> str:
    """`Tokenizer.render_chat` with whatever template."""
    if not messages:
        raise ValueError("messages: must not be empty")
    given = {"tools": tools or None, "documents": None, "add_generation_prompt": add_generation_prompt, **special_tokens, **variables}
    messages = [_plain_message(m, i, template) for i, m in enumerate(messages)]
    if continue_final_message:
        given["add_generation_prompt"] = False
        messages[-1] = {**messages[-1], "content": (messages[-1].get("content") or "") + _CUT}
    text = _rendered(template, messages, given)
    if not continue_final_message:
        return text
    kept, found, _ = text.rpartition(_CUT)
    if not found:
        raise ValueError("continue_final_message: the chat template leaves out the last message's content, so that nothing can continue it")
    return kept


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
    """Whichever form of a call's arguments the template can work with."""
    parsed = [_with_arguments(m, _parsed_call) for m in messages]
    try:
        return template.render(parsed, given)
    except ValueError:
        written = [_with_arguments(m, _written_call) for m in messages]
        if written == parsed:
            raise
    return template.render(written, given)  # some templates put arguments together with text


def _plain_message(message: dict[str, Any], index: int, template: ChatTemplate) -> dict[str, Any]:
    """A message as its template expects it: text content as one string or, where there are calls only, perhaps null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages: entry {index} must be an object with a 'role'")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"messages: entry {index}: only text content is supported")
        message = {**message, "content": "".join(part["text"] for part in content)}
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"messages: entry {index}: content must be text or a list of text parts, got {type(content).__name__}")
    elif calls and not content:
        message = {**message, "content": None if template.tests_for_null else ""}
    if template.wants_thinking and message.get("reasoning_content") and not (calls and content):  # with both, gpt-oss's refuses
        message = {**message, "thinking": message["reasoning_content"]}
    return message


def _with_arguments(message: dict[str, Any], form: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A message whose tool calls' arguments are all of one form."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [form(call) for call in calls]} if calls else message


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    """With an object for arguments."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (json.JSONDecodeError, RecursionError):
        return call  # the model's own slip, given back to it as it wrote it
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _written_call(call: dict[str, Any]) -> dict[str, Any]:
    """With JSON text for arguments."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": _to_json(function["arguments"])}}
