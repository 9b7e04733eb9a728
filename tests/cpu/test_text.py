"""Tokenizer, incremental detokenization and chat templates, on small tokenizers that are trained or written here."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from miniinfer.config import ConfigError
from miniinfer.engine.text import ChatTemplate, Detokenizer, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "def main():\n    return [x * 2 for x in range(10)]\n\n\tif True: pass",
    "naïve café, Ærøskøbing, smörgåsbord, e\u0301 and n\u0303 and Z\u0351\u036b\u0343",
    "你好，世界。日本語のテキスト、한국어 문장",
    "emoji 🙂🎉👩‍👩‍👧‍👦🏳️‍🌈 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 مرحبا שלום",
    "   spaces   and\u00a0more  ",
]


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|im_start|>"], show_progress=False)
    backend.train_from_iterator(TEXTS[:2] * 4, trainer)  # few merges beyond ASCII: characters outside it come apart into bytes
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("été🙂", normalized=False)])
    return backend


def sentencepiece(metaspace: bool) -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁The", "The", "▁quick", "quick", "▁fox", "é", "好", "🙂", "▁▁▁"]
    pieces += [c for c in "abcdefghijklmnopqrstuvwxyzT.,"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
    else:  # as Llama 2 has it
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
        )
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return backend


BYTE_LEVEL = Tokenizer(byte_level())
LLAMA, METASPACE = Tokenizer(sentencepiece(False)), Tokenizer(sentencepiece(True))
REST = ("", "\ufffd", "\ufffd\ufffd")  # of a whole decode: one open character; of an encoded surrogate Python's decoder keeps two bytes
SAMPLE = st.text(st.sampled_from("".join(TEXTS)) | st.characters(codec="utf-8"), max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True, prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, prompt)
    return [detokenizer.push([i]) for i in ids]


def added_by(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """What a decode of the whole shows beyond the prompt."""
    before = tokenizer.decode(prompt, skip)
    whole = tokenizer.decode(prompt + ids, skip)
    assert whole.startswith(before)
    return whole[len(before) :]


# --------------------------------------------------------------------------------------------------- detokenization


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=60), st.booleans())
@example([BYTE_LEVEL.encode("é")[0], 0, BYTE_LEVEL.encode("é")[1]], True)  # a skipped token within a character
@example([BYTE_LEVEL.encode("🙂")[0]] * 9, False)
@settings(max_examples=400, deadline=None)
def test_byte_level_pieces_are_the_whole_decode_for_any_ids(ids: list[int], skip: bool) -> None:
    text, whole = "".join(pieces(BYTE_LEVEL, ids, skip)), BYTE_LEVEL.decode(ids, skip)
    assert whole.startswith(text)
    assert whole[len(text) :] in REST


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, METASPACE], ids=["byte-level", "llama", "metaspace"])
@given(text=SAMPLE)
@settings(max_examples=150, deadline=None)
def test_no_piece_holds_half_a_character_of_a_valid_text(tokenizer: Tokenizer, text: str) -> None:
    prompt, ids = tokenizer.encode("The fox"), tokenizer.encode(text)
    expected = added_by(tokenizer, prompt, ids, True)
    given = pieces(tokenizer, ids, prompt=tuple(prompt))
    assert "".join(given) == expected
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in given)


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
@given(ids=st.lists(st.integers(0, LLAMA.vocab_size + 3).filter(lambda i: not 3 + 0x80 <= i < 3 + 0x100), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_sentencepiece_pieces_are_the_whole_decode(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """For any ids but bytes above 0x7F, where an invalid run is replaced byte by byte by the library and by maximal parts here."""
    prompt = tokenizer.encode("The")
    assert "".join(pieces(tokenizer, ids, skip, tuple(prompt))) == added_by(tokenizer, prompt, ids, skip)


@given(st.lists(st.integers(3, 258), max_size=30))
@settings(max_examples=100, deadline=None)
def test_byte_fallback_never_ends_a_piece_within_a_character(ids: list[int]) -> None:
    raw = bytes(i - 3 for i in ids)
    text = "".join(pieces(LLAMA, ids))
    whole = raw.decode("utf-8", "replace")
    assert whole.startswith(text) and whole[len(text) :] in REST


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    ids = BYTE_LEVEL.encode("🙂")
    assert len(ids) == 4
    assert pieces(BYTE_LEVEL, ids[2:], prompt=tuple(BYTE_LEVEL.encode("abc ") + ids[:2])) == ["", "🙂"]
    assert pieces(LLAMA, LLAMA.encode("quick"), prompt=tuple(LLAMA.encode("The")))[0] == " "  # the first word of an output keeps its space


def test_invalid_bytes_are_shown_at_once_and_do_not_hold_up_what_follows() -> None:
    lead, letter = BYTE_LEVEL.encode("é")[0], BYTE_LEVEL.encode("x")[0]
    assert pieces(BYTE_LEVEL, [lead, letter, lead]) == ["", "\ufffdx", ""]


def test_special_and_unknown_ids() -> None:
    end, tool = BYTE_LEVEL.token_id("<|end|>"), BYTE_LEVEL.token_id("<tool_call>")
    assert end is not None and tool is not None
    assert pieces(BYTE_LEVEL, [end, tool, -1, 10**6, 2**40], skip=True) == ["", "<tool_call>", "", "", ""]
    assert pieces(BYTE_LEVEL, [end, tool], skip=False) == ["<|end|>", "<tool_call>"]
    assert BYTE_LEVEL.decode([-1, 10**6, 2**40, tool]) == "<tool_call>"
    assert end in BYTE_LEVEL.special_ids and tool not in BYTE_LEVEL.special_ids


def test_token_bytes_and_text() -> None:
    for text in TEXTS:
        ids = BYTE_LEVEL.encode(text)
        assert b"".join(BYTE_LEVEL.token_bytes(i) for i in ids).decode() == text
    half = BYTE_LEVEL.encode("é")[0]
    assert (BYTE_LEVEL.token_bytes(half), BYTE_LEVEL.token_text(half)) == (b"\xc3", "\ufffd")
    assert [LLAMA.token_bytes(i) for i in (4, 3 + 0xFF, 1)] == [b"\x01", b"\xff", b"<s>"]
    assert LLAMA.token_text(LLAMA.token_id("▁The") or 0) == " The"
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.token_id("été🙂") or 0) == "été🙂".encode()


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt: .*surrogate"):
        BYTE_LEVEL.encode("\ud800")


def test_encode_batch_is_encode_of_each() -> None:
    assert BYTE_LEVEL.encode_batch(TEXTS) == [BYTE_LEVEL.encode(t) for t in TEXTS]


# ---------------------------------------------------------------------------------------------------------- folders


def save(folder, backend: tokenizers.Tokenizer, **settings: object) -> None:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_from_folder_agrees_with_transformers(tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = byte_level()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    added = {
        str(backend.get_vocab_size()): {"content": "<|late|>", "special": True},
        str(backend.token_to_id("<tool_call>")): {"content": "<tool_call>", "special": True},
    }
    save(
        tmp_path,
        backend,
        eos_token={"__type": "AddedToken", "content": "<|end|>"},
        bos_token="<|im_start|>",
        added_tokens_decoder=added,
        chat_template=CHATML,
    )
    ours = Tokenizer.from_folder(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*TEXTS, "<|im_start|>user<tool_call>x<|late|>y<|end|>"]:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
            assert "".join(pieces(ours, ids, special)) == ours.decode(ids, special)
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
    for messages, tools in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(messages, tools) == expected


def test_folder_errors_name_the_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file.*--tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level(), added_tokens_decoder={"9999": {"content": "<|late|>", "special": True}})
    with pytest.raises(ConfigError, match="late.*9999"):
        Tokenizer.from_folder(tmp_path)
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    save(tmp_path, backend)
    with pytest.raises(ConfigError, match="decoder of type WordPiece"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level())
    with pytest.raises(ConfigError, match="chat_template: nowhere"):
        Tokenizer.from_folder(tmp_path, chat_template="nowhere.jinja")


def test_where_chat_templates_come_from(tmp_path) -> None:
    hello = [{"role": "user", "content": "hi"}]
    save(tmp_path, byte_level())
    with pytest.raises(ValueError, match="no chat template.*--chat-template"):
        Tokenizer.from_folder(tmp_path).render_chat(hello)
    save(tmp_path, byte_level(), chat_template=[{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}])
    assert Tokenizer.from_folder(tmp_path).render_chat(hello) == "list"
    assert Tokenizer.from_folder(tmp_path).render_chat(hello, [{"type": "function"}]) == "tools"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_folder(tmp_path).render_chat(hello) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(tmp_path).render_chat(hello) == "jinja"
    (tmp_path / "mine").write_text("mine {{ eos_token }}")
    save(tmp_path, byte_level(), eos_token="<|end|>")
    assert Tokenizer.from_folder(tmp_path, chat_template=tmp_path / "mine").render_chat(hello) == "mine <|end|>"


# --------------------------------------------------------------------------------------------------- chat templates

CHATML = """\
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- "<|end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "forbidden" %}{{ raise_exception("the role " + message.role + " is not known") }}{% endif %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- generation %}
    {{- message.content or "" }}
    {%- for call in message.tool_calls or [] %}
        {{- "<tool_call>" + (call.function | tojson) }}
    {%- endfor %}
    {%- endgeneration %}
    {{- "<|end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ "<think></think>" }}{% endif %}
{%- endif %}
"""
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "<é & 'ü'>", "b": [1, 2.5, None]}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "a < b", "parameters": {"type": "object", "properties": {}}}}
CONVERSATIONS = [
    ([{"role": "user", "content": "hi <b>&amp;</b>"}], None),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}], [TOOL]),
    ([{"role": "user", "content": "hi"}, {"role": "stop", "content": "unseen"}], None),
]


def chat(template: str) -> Tokenizer:
    return Tokenizer(byte_level(), {"eos_token": "<|end|>"}, {"default": template})


def test_chatml_with_tools() -> None:
    text = chat(CHATML).render_chat(*CONVERSATIONS[1])
    assert text == (
        "<|im_start|>system\n" + json.dumps(TOOL) + "\n<|end|>\n<|im_start|>user\nhi<|end|>\n<|im_start|>assistant\n<tool_call>"
        + json.dumps(CALL["function"], ensure_ascii=False) + "<|end|>\n<|im_start|>tool\n3<|end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert chat(CHATML).render_chat([{"role": "user", "content": "x"}], enable_thinking=False).endswith("assistant\n<think></think>")
    assert chat(CHATML).render_chat([{"role": "user", "content": "x"}], add_generation_prompt=False).endswith("x<|end|>\n")


def test_messages_are_made_plain_for_templates() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat("{{ messages[0].content }}").render_chat([{"role": "user", "content": parts}]) == "ab"
    arguments = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    for written, shown in (('{"a": 1}', '{"a": 1}'), ("{broken", '"{broken"'), ("[1]", '"[1]"')):
        call = {"type": "function", "function": {"name": "f", "arguments": written}}
        assert chat(arguments).render_chat([{"role": "assistant", "content": "", "tool_calls": [call]}]) == shown


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: must not be empty"),
        ([{"content": "x"}], "messages: entry 0 must be an object with a 'role'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages: entry 0: only text"),
        ([{"role": "forbidden", "content": "x"}], "messages: the chat template refuses them: the role forbidden is not known"),
        ([{"role": "user", "content": 5}], "messages: entry 0: content must be text"),
    ],
)
def test_bad_conversations_are_value_errors(messages: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chat(CHATML).render_chat(messages)


def test_bad_templates_are_value_errors() -> None:
    hello = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="chat_template: line 2: "):
        chat("ok\n{% if %}").render_chat(hello)
    with pytest.raises(ValueError, match="UndefinedError"):
        chat("{{ nothing.at.all }}").render_chat(hello)
    with pytest.raises(ValueError, match="RecursionError"):
        chat("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render_chat(hello)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['sys'].modules }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'root'}) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(template).render([{"role": "user", "content": "hi"}], {})


def test_imports_stay_light() -> None:
    code = "import sys, miniinfer.engine.client; bad = {'torch', 'transformers', 'numpy'} & set(sys.modules); print(bad); sys.exit(bool(bad))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
