"""The offline API with vLLM's arguments, on the bundled model: what each of them does, and mistakes that must not pass in silence."""

from __future__ import annotations

import re
from typing import Any

import pytest

from miniinfer import LLM, SamplingParams
from miniinfer.data import StructuredOutputsParams

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("bundled", max_model_len=256, num_threads=1, max_num_seqs=2)


@pytest.mark.parametrize(("priority", "each"), [(None, [0, 0, 0]), (1, [1, 1, 1]), ([3, 1, 2], [3, 1, 2])])
def test_priorities_for_all_or_one_each(llm: LLM, monkeypatch: pytest.MonkeyPatch, priority: Any, each: list[int]) -> None:
    asked: list[int] = []
    add = llm.core.add

    def noted(message: Any) -> Any:
        asked.append(message.priority)
        return add(message)

    monkeypatch.setattr(llm.core, "add", noted)
    assert len(llm.generate(["a", "b", "c"], SamplingParams(max_tokens=3), priority=priority)) == 3
    llm.chat([HELLO] * 3, SamplingParams(max_tokens=1), priority=priority)
    assert asked == each * 2


@pytest.mark.parametrize("priority", [[], [1], [1, 2, 3]])
def test_as_many_priorities_as_prompts(llm: LLM, priority: list[int]) -> None:
    with pytest.raises(ValueError, match=f"priority: {len(priority)} values for 2 prompts"):
        llm.generate(["a", "b"], priority=priority)
    with pytest.raises(ValueError, match="priority"):
        llm.chat([HELLO] * 2, priority=priority)
    assert not llm.core.has_work


def test_a_message_that_goes_on(llm: LLM) -> None:
    (output,) = llm.chat([*HELLO, {"role": "assistant", "content": "My name"}], SamplingParams(max_tokens=4), continue_final_message=True)
    assert output.prompt is not None and output.prompt.endswith("<|im_start|>assistant\nMy name")


def test_what_a_prompt_cannot_bring_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="not 'multi_modal_data'"):
        llm.generate({"prompt": "<image>", "multi_modal_data": {"image": object()}})  # type: ignore[typeddict-unknown-key]
    (output,) = llm.generate({"prompt": "a", "multi_modal_data": None}, SamplingParams(max_tokens=1))  # type: ignore[typeddict-unknown-key]
    assert len(output.outputs[0].token_ids) == 1


def test_a_bias_ends_with_its_request(llm: LLM) -> None:
    """Whoever gets its row next is not biased, even beside another that is."""
    plain = SamplingParams(max_tokens=4, temperature=0)
    (alone,) = llm.generate(["One day"], plain)
    llm.generate(["a", "b"], SamplingParams(max_tokens=2, logit_bias={70: 100.0}))
    beside, biased = llm.generate(["One day", "c"], [plain, SamplingParams(max_tokens=4, logit_bias={71: 100.0})])
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids and biased.outputs[0].token_ids == [71] * 4


def test_bad_words_are_not_written(llm: LLM) -> None:
    """Of one token or of several, with and without a blank; beside others, and only while the request runs."""
    tokenizer, plain = llm.tokenizer, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    assert tokenizer is not None
    free = llm.generate(["Once upon a time", "One day"], plain)
    first = free[0].outputs[0].text
    banned: list[str] = []
    lengths = set()
    while len(banned) < 8:  # each time the longest word that it wrote
        bad = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, bad_words=banned)
        limited, other = llm.generate(["Once upon a time", "One day"], [bad, plain])
        text = limited.outputs[0].text
        assert not any(f" {word}" in text for word in banned) and other.outputs[0].text == free[1].outputs[0].text
        assert not banned or text != first
        banned.append(max(re.findall(r"(?<= )[a-z]+", text), key=len))
        lengths.add(len(tokenizer.encode(" " + banned[-1], add_special_tokens=False)))
    assert 1 in lengths and max(lengths) > 1, lengths
    pair = free[1].outputs[0].token_ids[3:6]
    again = llm.generate("One day", SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, bad_words_token_ids=[pair]))[0].outputs[0].token_ids
    assert again[:5] == free[1].outputs[0].token_ids[:5] and again[5] != pair[2] and pair not in [again[i : i + 3] for i in range(22)]
    assert llm.generate(["Once upon a time"], plain)[0].outputs[0].text == first


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["a b " * 40]}, "bad_words"),
        ({"bad_words_token_ids": [[]]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1, 10**7]]}, "bad_words_token_ids"),
    ],
)
def test_bad_words_that_are_none(llm: LLM, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        llm.generate(["a"], SamplingParams(**fields))


def test_a_grammar_that_allows_nothing_but_bad_words(llm: LLM) -> None:
    """It comes first: the request must not fail for it."""
    params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), bad_words=["yes", "no", "y", "n"])
    (output,) = llm.generate(["Is it? "], params)
    assert output.error is None and output.outputs[0].text in ("yes", "no")


def test_a_request_that_fails_alone_is_told_of(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    params = [SamplingParams(max_tokens=2), SamplingParams(structured_outputs=StructuredOutputsParams(regex="(unclosed"))]
    with caplog.at_level("WARNING"):
        good, bad = llm.generate(["a", "b"], params)
    assert good.error is None and len(good.outputs[0].token_ids) == 2
    assert bad.error is not None and bad.outputs[0].finish_reason == "error"
    assert caplog.messages == [f"1 of 2 requests failed, see `error` of their outputs; the first: prompts[1]: {bad.error}"]
