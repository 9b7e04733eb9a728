"""Validation, stop strings, logprobs, siblings, and that deltas add up to the whole."""

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from miniinfer.data import RequestOutput, SamplingParams, SequenceUpdate, TokenLogprobs
from miniinfer.engine.output import OutputProcessor, StopStrings, merge, snapshot, validate
from miniinfer.engine.text import Tokenizer


def make_tokenizer() -> Tokenizer:
    """A token for every byte and for a few words, byte-level."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġworld", "STOP", "Hello", "xST", "OPy"]
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(alphabet + words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>")])
    return Tokenizer(backend)


TOKENIZER = make_tokenizer()
END = TOKENIZER.token_id("<|end|>") or 0
INFO = {"vocab_size": 300, "max_model_len": 100}


def ids(*parts: str) -> list[int]:
    """Whole words where the vocabulary has them as one token, else byte by byte."""
    out: list[int] = []
    for part in parts:
        whole = TOKENIZER.token_id(part.replace(" ", "Ġ"))
        out += [whole] if whole is not None else TOKENIZER.encode(part)
    return out


class Run:
    """One request through two processors, one of deltas and one of whole results, which must agree."""

    def __init__(self, tokenizer: Tokenizer | None = TOKENIZER, **params: Any) -> None:
        self.deltas, self.whole = OutputProcessor(tokenizer, deltas=True), OutputProcessor(tokenizer)
        self.adds = self.deltas.add("r", None, [1, 2], SamplingParams(max_tokens=None, **params))
        self.whole.add("r", None, [1, 2], SamplingParams(max_tokens=None, **params))
        self.total: RequestOutput | None = None
        self.aborts: list[str] = []
        self.pieces: list[str] = []

    def feed(self, *updates: SequenceUpdate) -> RequestOutput | None:
        results, aborts = self.deltas.process(updates)
        self.aborts += aborts
        for delta in results:
            self.pieces += [o.text for o in delta.outputs]
            if self.total is None:
                self.total = snapshot(delta)
            else:
                merge(self.total, delta)
        finished, same = self.whole.process(updates)
        assert same == aborts
        assert bool(finished) == bool(results and results[-1].finished)
        if finished:
            assert finished == [self.total]
            assert not len(self.deltas) and not len(self.whole)
        return self.total

    def tokens(self, tokens: list[int], finish: str | None = None, stop_reason: int | None = None, at_once: bool = False) -> RequestOutput:
        groups = [tokens] if at_once else [[t] for t in tokens]
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            self.feed(SequenceUpdate("r", group, finish if last else None, stop_reason if last else None))
        assert self.total is not None
        return self.total


# ------------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], {}, "prompt: must not be empty"),
        ([1, "2"], {}, "prompt: token ids must be integers, found str"),
        ([1, True], {}, "prompt: token ids must be integers, found bool"),
        ([np.int64(1)], {}, "prompt: token ids must be integers, found int64"),
        ([1, 300], {}, "prompt: token id 300 is outside the vocabulary of 300"),
        ([-1], {}, "prompt: token id -1 is outside"),
        ([1] * 100, {}, "prompt: 100 tokens leave no room for output; the context holds 100"),
        ([1], {"logit_bias": {300: 1.0}}, "logit_bias: token id 300 is outside"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids: token id -1 is outside"),
        ([1], {"stop": "x", "detokenize": False}, "stop: stop strings need text"),
        ([1], {"top_k": 1.5}, "top_k: Expected `int`, got `float`"),
        ([1], {"max_tokens": 2.0}, "max_tokens: Expected `int | null`, got `float`"),
        ([1], {"stop": ["a", 5]}, r"stop\[1\]: Expected `str`, got `int`"),
        ([1], {"seed": "a"}, None),
        ([1], {"temperature": np.float32(0.5)}, "sampling parameters: .*float32"),
    ],
)
def test_validate_names_the_field(prompt: list, params: dict, said: str | None) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        validate(prompt, SamplingParams(**params), INFO, TOKENIZER)


def test_validate_passes_what_can_run() -> None:
    validate([0, 299], SamplingParams(stop=["a"], logit_bias={0: -100, 299: 5.5}, stop_token_ids=[3], seed=2**63 - 1), INFO, TOKENIZER)
    validate([1] * 99, SamplingParams(max_tokens=None), INFO, None)
    with pytest.raises(ValueError, match="stop: "):
        validate([1], SamplingParams(stop="a"), INFO, None)


# ---------------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(at_once: bool, include: bool) -> None:
    run = Run(stop=["STOP"], include_stop_str_in_output=include)
    output = run.tokens(ids("Hello", " world", "xST", "OPy", "Hello"), at_once=at_once).outputs[0]
    assert output.text == ("Hello worldxSTOP" if include else "Hello worldx")
    assert output.token_ids == ids("Hello", " world", "xST", "OPy")  # up to the one that completed it
    assert (output.finish_reason, output.stop_reason) == ("stop", "STOP")
    assert run.aborts == ["r"]
    assert run.total is not None and run.total.finished


def test_a_stop_string_of_half_characters() -> None:
    run = Run(stop=["🙂"])
    output = run.tokens(ids("a🙃b🙂c")).outputs[0]  # the two emoji share their first three bytes
    assert output.text == "a🙃b"
    assert output.token_ids == ids("a🙃b🙂")
    assert run.pieces == ["a", "", "", "", "🙃", "b", "", "", "", ""]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    run = Run(stop=["aab", "xyz"])
    run.tokens(ids("aaacxyxy"), "length")
    assert run.pieces == ["", "", "a", "aac", "", "", "xy", "xy"]
    assert run.total is not None and run.total.outputs[0].text == "aaacxyxy"
    assert run.total.outputs[0].finish_reason == "length" and run.aborts == []


def test_the_earliest_match_wins_and_the_engine_may_have_ended_already() -> None:
    run = Run(stop=["world", "o w", "zzz"])
    output = run.tokens(ids("Hello", " world"), "length", at_once=True).outputs[0]
    assert (output.text, output.stop_reason, output.finish_reason) == ("Hell", "o w", "stop")
    assert run.aborts == []


def test_min_tokens_come_before_stop_strings() -> None:
    run = Run(stop=["b"], min_tokens=4)
    output = run.tokens(ids("abcabcab")).outputs[0]
    assert (output.text, output.token_ids) == ("abca", ids("abcab"))


@given(
    text=st.text("ab🙂c", max_size=30),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    cuts=st.integers(0, 2**30),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_however_the_text_arrives(text: str, stops: list[str], include: bool, cuts: int) -> None:
    """However it is cut: what is shown is the text before a first match, and never so much as may yet be cut off."""
    rng, at, shown, found = random.Random(cuts), 0, "", None
    checker = StopStrings(stops, include)
    while at < len(text) and found is None:
        step = rng.randint(1, 4)
        new, found = checker.push(text[at : at + step], True)
        shown, at = shown + new, at + step
        if found is None:
            held = text[:at][len(shown) :]
            assert text[:at].startswith(shown)
            assert held == "" or any(stop.startswith(held) for stop in stops)
    first = min((text[:at].find(stop) for stop in stops if stop in text[:at]), default=None)
    if found is None:
        assert first is None and shown + checker.flush() == text
    else:
        assert first is not None and shown == text[:first] + (found if include else "") and text[first:].startswith(found)


# --------------------------------------------------------------------------------------------------- ends and errors


def test_the_token_that_ends_an_output_is_kept_but_not_shown() -> None:
    assert Run(skip_special_tokens=False).tokens([*ids("Hello"), END], "stop").outputs[0].text == "Hello"
    output = Run(stop_token_ids=ids("a")).tokens(ids("Hello", "a"), "stop", ids("a")[0]).outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("Hello", ids("Hello", "a"), ids("a")[0])
    output = Run(stop_token_ids=ids("a"), include_stop_str_in_output=True).tokens(ids("Hello", "a"), "stop", ids("a")[0]).outputs[0]
    assert output.text == "Helloa"
    assert Run(ignore_eos=True).tokens([END, *ids("Hello")], "length").outputs[0].text == "Hello"


def test_half_a_character_at_the_end_is_not_shown() -> None:
    output = Run().tokens(ids("a🙂")[:3], "length").outputs[0]
    assert (output.text, len(output.token_ids)) == ("a", 3)


def test_without_a_tokenizer_there_are_ids_only() -> None:
    output = Run(tokenizer=None, logprobs=0).feed(SequenceUpdate("r", [5], "length", logprobs=[TokenLogprobs([5], [-1.0], [1])]))
    assert output is not None and (output.outputs[0].text, output.outputs[0].token_ids) == ("", [5])
    assert output.outputs[0].logprobs[0][5].decoded_token is None  # type: ignore[index]


def test_an_error_is_told() -> None:
    run = Run(n=2)
    run.feed(SequenceUpdate("r#0", ids("a")), SequenceUpdate("r#1", [], "error", error="no pages"))
    assert run.total is not None and run.total.error == "no pages" and not run.total.finished
    run.feed(SequenceUpdate("r#0", ids("b"), "length"))
    assert run.total.error == "no pages" and run.total.finished
    assert [(o.text, o.finish_reason) for o in run.total.outputs] == [("ab", "length"), ("", "error")]
    assert run.aborts == []


def test_abort_and_drop() -> None:
    processor = OutputProcessor(TOKENIZER, deltas=True)
    processor.add("r", "p", [1], SamplingParams(n=2, stop=["ab"]))
    assert processor.process([SequenceUpdate("r#0", ids("a")), SequenceUpdate("r#1", ids("x"), "length")])[0][0].finished is False
    (last,), running = processor.abort("r")
    assert running == ["r#0"] and last.finished
    assert [(o.index, o.text, o.finish_reason) for o in last.outputs] == [(0, "a", "abort")]  # with what was held back
    assert processor.abort("r") == ([], []) and len(processor) == 0
    processor.add("s", None, [1], SamplingParams(n=2))
    processor.add("t", None, [1], SamplingParams())
    assert processor.drop(["s", "unknown", "t"]) == ["s#0", "s#1", "t"] and len(processor) == 0


# ------------------------------------------------------------------------------------------------ siblings, logprobs


def test_siblings() -> None:
    run = Run(n=3, stop=["b"])
    assert [(a.id, a.group, a.params.n) for a in run.adds] == [(f"r#{i}", "r", 3) for i in range(3)]
    run.feed(SequenceUpdate("r#2", ids("x"), cached_tokens=2), SequenceUpdate("r#0", ids("a")))
    run.feed(SequenceUpdate("r#1", ids("b")), SequenceUpdate("r#0", ids("c"), "length"))
    assert run.total is not None and not run.total.finished and run.total.num_cached_tokens == 0
    run.feed(SequenceUpdate("r#1", ids("z")), SequenceUpdate("r#2", ids("y"), "length"))
    assert [(o.index, o.text, o.finish_reason, o.stop_reason) for o in run.total.outputs] == [
        (0, "ac", "length", None),
        (1, "", "stop", "b"),
        (2, "xy", "length", None),
    ]
    assert run.aborts == ["r#1"]


def test_request_ids_do_not_collide() -> None:
    processor = OutputProcessor(None)
    processor.add("x", None, [1], SamplingParams(n=2))
    for taken in ("x", "x#1"):
        with pytest.raises(ValueError, match=f"request_id: '{taken}' is already running"):
            processor.add(taken, None, [1], SamplingParams())
    assert len(processor) == 1


def test_logprobs_in_vllms_shape() -> None:
    a, b, c = ids("abc")
    run = Run(logprobs=1, prompt_logprobs=1)
    prompt = [TokenLogprobs([2, b, c], [-3.0, -0.5, -1.0], [9, 1, 2])]
    first = [TokenLogprobs([a, b, c], [-2.0, -0.25, -1.0], [3, 1, 2])]  # one alternative more than asked for
    second = [TokenLogprobs([b, b, c], [-0.5, -0.5, -1.0], [1, 1, 2])]
    run.feed(SequenceUpdate("r", [a], logprobs=first, prompt_logprobs=prompt, cached_tokens=1))
    run.feed(SequenceUpdate("r", [b], "length", logprobs=second, cached_tokens=1))
    total = run.total
    assert total is not None and total.outputs[0].logprobs is not None and total.prompt_logprobs is not None
    shown = [{k: (v.logprob, v.rank, v.decoded_token) for k, v in entry.items()} for entry in total.outputs[0].logprobs]
    assert shown == [{a: (-2.0, 3, "a"), b: (-0.25, 1, "b")}, {b: (-0.5, 1, "b")}]
    assert [next(iter(entry)) for entry in total.outputs[0].logprobs] == [a, b]  # the token itself first
    assert total.outputs[0].cumulative_logprob == -2.5
    assert total.prompt_logprobs[0] is None and total.prompt_logprobs[1][2].rank == 9  # type: ignore[index]
    assert total.num_cached_tokens == 1


def test_logprobs_end_with_the_tokens_of_a_stop_string() -> None:
    tokens = ids("abc")
    run = Run(logprobs=0, stop=["b"])
    run.feed(SequenceUpdate("r", tokens, logprobs=[TokenLogprobs([t], [-1.0], [1]) for t in tokens]))
    assert run.total is not None
    output = run.total.outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 2
    assert math.isclose(output.cumulative_logprob or 0, -2.0)


def test_no_logprobs_unless_asked() -> None:
    run = Run()
    run.feed(SequenceUpdate("r", [1], "length", logprobs=[TokenLogprobs([1], [-1.0], [1])], prompt_logprobs=[TokenLogprobs([1], [-1.0], [1])]))
    assert run.total is not None
    assert (run.total.outputs[0].logprobs, run.total.outputs[0].cumulative_logprob, run.total.prompt_logprobs) == (None, None, None)


@given(seed=st.integers(0, 2**30))
@settings(max_examples=100, deadline=None)
def test_deltas_add_up_however_updates_arrive(seed: int) -> None:
    """Random texts, samples and chunks: `Run` compares the two processors, and here the text with a plain decode."""
    rng = random.Random(seed)
    n = rng.randint(1, 4)
    run = Run(n=n, stop=["never there"])
    names = ["r"] if n == 1 else [f"r#{i}" for i in range(n)]
    rest = {name: TOKENIZER.encode("".join(rng.choices("aé🙂 世ne", k=rng.randint(1, 20)))) for name in names}
    texts = [TOKENIZER.decode(tokens) for tokens in rest.values()]
    while rest:
        updates = []
        for name in rng.choices(list(rest), k=rng.randint(1, 3)):
            if name in rest:
                take = rng.randint(1, 5)
                new, rest[name] = rest[name][:take], rest[name][take:]
                updates.append(SequenceUpdate(name, new, None if rest[name] else "length"))
                if not rest[name]:
                    del rest[name]
        run.feed(*updates)
    assert run.total is not None and run.total.finished
    assert [o.text for o in run.total.outputs] == texts


def test_a_snapshot_does_not_change() -> None:
    run = Run(logprobs=0)
    run.feed(SequenceUpdate("r", [1], logprobs=[TokenLogprobs([1], [-1.0], [1])]))
    assert run.total is not None
    before = snapshot(run.total)
    run.feed(SequenceUpdate("r", [2], logprobs=[TokenLogprobs([2], [-1.0], [1])]))
    assert before.outputs[0].token_ids == [1] and len(before.outputs[0].logprobs or []) == 1
