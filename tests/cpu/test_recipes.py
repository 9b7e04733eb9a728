"""The bundled model's recipe: generators, checks, tokenizer and template, as its training and its users meet them."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bundled"
sys.path.insert(0, str(RECIPE))

import chat  # noqa: E402
import evaluate  # noqa: E402
import first_minute  # noqa: E402
import generate  # noqa: E402
import mix  # noqa: E402
import tables  # noqa: E402
import talk  # noqa: E402
import tasks_chat  # noqa: E402
import tasks_text  # noqa: E402
from sample import Check, Sample, Voice, _mistyped, _parse  # noqa: E402

from miniinfer.config import ModelConfig  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> chat.Encoder:
    return chat.Encoder()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    voice = Voice("test")
    return [mix.conversation(voice, training=False, sample=g(voice)) for g in mix.TASKS for _ in range(40)]


def reply_text(sample: Sample) -> str:
    message = sample.messages[-1]
    if message.get("tool_calls"):
        return "<tool_call>\n" + json.dumps(message["tool_calls"][0]["function"]) + "\n</tool_call>"
    return message["content"]


def test_every_generated_reply_passes_its_own_check(samples: list[Sample]):
    for sample in samples:
        assert sample.check.passes(reply_text(sample)), sample
        assert not sample.check.passes("something else"), sample
        roles = [m["role"] for m in sample.messages if m["role"] not in ("system", "tool")]
        assert roles[0] == "user" and roles[-1] == "assistant"


def test_wordings_leave_no_template_marks(samples: list[Sample]):
    for sample in samples:
        for message in sample.messages:
            if message["role"] == "user":
                text = message["content"]
                assert "|" not in text and "{" not in text and not text.startswith("!") and text.strip() == text and text, sample


def test_generation_is_a_function_of_the_seed():
    def draw(seed: str) -> list[Sample]:
        voice = Voice(seed)
        return [mix.conversation(voice, training=True) for _ in range(50)]

    assert draw("a") == draw("a") != draw("b")


def test_held_out_problems_stay_out_of_training():
    voice = Voice("train")
    drawn = [mix.conversation(voice, training=True) for _ in range(3000)]
    assert not any(s.held_out for s in drawn)
    share = sum(s.held_out for s in (mix.conversation(voice, training=False) for _ in range(3000))) / 3000
    assert 0.005 < share < 0.05
    evaluated = evaluate.problems(3)
    assert all(s.held_out or not s.key for s in evaluated)
    assert {s.task for s in drawn} - {"again"} <= {s.task for s in evaluated} | {"list_sum", "list_stat"}


def test_arithmetic_is_right():
    voice = Voice("sums")
    for generator in mix.tasks_math.TASKS:
        for _ in range(60):
            sample = generator(voice)
            if sample.task in ("add", "subtract", "multiply", "divide", "chain") and "=" in sample.messages[-1]["content"]:
                left, right = sample.messages[-1]["content"].split("=")
                assert eval(left) == float(right), sample


def test_number_names():
    assert [tables.in_words(n) for n in (0, 13, 40, 42, 100, 342, 1000, 9017)] == [
        "zero", "thirteen", "forty", "forty-two", "one hundred", "three hundred forty-two", "one thousand", "nine thousand seventeen",
    ]  # fmt: skip


def test_learned_tokens_are_the_replies(encoder: chat.Encoder, samples: list[Sample]):
    for sample in samples[::7]:
        ((ids, marks),) = encoder.encode([sample])
        runs, text = [], []
        for token, mark in zip([*ids, 0], [*marks, 0], strict=True):
            if mark:
                text.append(token)
            elif text:
                runs.append(text)
                text = []
        turns = [m for m in sample.messages if m["role"] == "assistant"]
        assert len(runs) == len(turns)
        for run, message in zip(runs, turns, strict=True):
            assert run[-1] == chat.IM_END
            if not message.get("tool_calls"):
                assert encoder.tokenizer.decode(run[:-1]) == message["content"]
        assert sample.check.passes(encoder.tokenizer.decode(runs[-1][:-1]))


def test_training_text_starts_with_what_a_server_sends(encoder: chat.Encoder, samples: list[Sample]):
    for sample in samples[::5]:
        ((ids, _),) = encoder.encode([sample])
        prompt = encoder.prompt(sample)
        assert ids[: len(prompt)] == prompt


def test_fast_encoding_equals_the_tokenizer(encoder: chat.Encoder, samples: list[Sample]):
    texts = [encoder.render(s) for s in samples]
    rng = random.Random(0)
    texts += ["".join(rng.choice(" \n\t\rab'sZ09<|>.,(){}") for _ in range(60)) for _ in range(300)]
    texts += ["  <|im_end|>  x", "<|im_start|>", "naïve café — 東京 🙂 ١٢"]
    for text in texts:
        assert encoder.ids(text) == encoder.tokenizer.encode(text, add_special_tokens=False), text
        assert encoder.tokenizer.decode(encoder.ids(text), skip_special_tokens=False) == text


def test_transformers_reads_tokenizer_and_template_alike(encoder: chat.Encoder, samples: list[Sample]):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(chat.ASSETS))
    for sample in samples[::11]:
        text = theirs.apply_chat_template(sample.messages, tools=sample.tools or None, tokenize=False)
        assert text == encoder.render(sample)
        assert theirs(text, add_special_tokens=False)["input_ids"] == encoder.ids(text)
    assert theirs.eos_token == "<|im_end|>"


def test_checkpoint_folder_is_consistent(encoder: chat.Encoder):
    config = ModelConfig.from_folder(chat.ASSETS)
    assert config.family == "qwen3" and config.vocab_size == encoder.tokenizer.vocab_size and config.tie_embeddings
    assert set(config.eos_token_ids) == {chat.IM_END, chat.END_OF_TEXT}
    assert [encoder.tokenizer.token_id(s) for s in chat.SPECIALS] == list(range(len(chat.SPECIALS)))
    assert 6e6 < config.num_parameters < 10e6 and 2 * config.num_parameters < 19.9e6
    template = json.loads((chat.ASSETS / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (RECIPE / "chat_template.jinja").read_text().rstrip("\n")


def test_template_renders_tool_calls_from_strings_and_several_results(encoder: chat.Encoder):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    text = encoder.tokenizer.render_chat(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call, call]},
         {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}], tools=[]
    )  # fmt: skip
    assert text.count('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>') == 2
    assert text.count("<|im_start|>user") == 2 and text.count("<tool_response>") == 2 and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (Check("exact", ("a.", "b.")), " b.\n", "b"),
        (Check("contains", ("Fox", "ruby")), "A fox called Ruby", "A fox"),
        (Check("json", ('{"a": 1}',)), '{ "a":1 }', '{"a": 2}'),
        (Check("keys", ("a", "b")), '{"b": 1, "a": 2}', '{"a": 2}'),
        (Check("tool", ('{"name": "f", "arguments": {}}',)), '<tool_call>{"arguments": {}, "name": "f"}</tool_call>', "<tool_call>{</tool_call>"),
    ],
)
def test_checks(check: Check, good: str, bad: str):
    assert check.passes(good) and not check.passes(bad)


def test_generation_fills_folders(tmp_path: Path, encoder: chat.Encoder):
    from miniinfer.train.data import Documents

    counts = generate.everything(tmp_path, tokens=6000, seconds=60, processes=2, source=None, valid=20)
    documents = Documents(tmp_path / "train")
    assert counts["conversation"] == documents.tokens_per_epoch >= 6000
    assert int(documents.lengths.max()) <= generate.LONGEST and 0.1 < documents.learned.float().mean() < 0.7
    assert len(Documents(tmp_path / "valid").lengths) == 20


def test_report_counts(encoder: chat.Encoder):
    voice = Voice("report")
    drawn = [mix.tasks_math.add(voice) for _ in range(4)]
    right = [[*encoder.ids(s.messages[-1]["content"]), chat.IM_END] for s in drawn]
    replies = [right[0], right[1], right[2][:-1], encoder.ids("5") + [chat.IM_END]]
    result = evaluate.report(drawn, replies, encoder)
    row = result["tasks"]["add"]
    assert (row["count"], row["right"], row["ended"]) == (4, 2, 3) and result["mean accuracy over tasks"] == 0.5
    assert "| add | 4 | 50.0% | 75.0% |" in evaluate.table(result)


def test_no_wording_has_two_answers():
    """All choices of all wordings without slots, as plain lower-case text: each belongs to one set of replies."""
    tables_of_talk = (talk.SMALL_TALK, first_minute.SELF, first_minute.OTHERS, first_minute.FOLLOW_UPS, talk.KNOWLEDGE, talk.PYTHON)
    entries = [entry for table in tables_of_talk for entry in table]
    entries.append(((*tasks_chat._UNKNOWN, *first_minute.UNKNOWABLE), (tasks_chat.DONT_KNOW,)))
    answers: dict[str, tuple[str, ...]] = {}
    clashes = []
    for wordings, replies in entries:
        for wording in wordings:
            for parts in itertools.product(*_parse(wording)):
                said = "".join(parts).lower().strip("!?. ").replace(",", "")
                if "{" not in said and said and answers.setdefault(said, replies) != replies:
                    clashes.append(said)
    assert not clashes


def test_stories_are_about_the_hero_asked_for():
    voice = Voice("stories")
    heroes = set()
    for _ in range(300):
        told = tasks_chat.story(voice)
        *_, ask, reply = (m["content"] for m in told.messages)
        assert all(part.lower() in ask.lower() for part in told.check.accept[1:]), told
        assert told.check.passes(reply)
        heroes.add(told.key)
    assert len(heroes) > 150


def test_echo_answers_with_the_users_own_letters():
    voice = Voice("echo")
    for _ in range(500):
        drawn = tasks_text.echo(voice)
        assert drawn.messages[-1]["content"] in drawn.messages[0]["content"], drawn


def test_mistyped_templates_keep_their_slots():
    chance = random.Random(0)
    for _ in range(300):
        text = _mistyped('What is the plural of "{something}" in {language}?', chance)
        assert '"{something}"' in text and "{language}" in text and text != text.upper()
