"""The offline API with vLLM's arguments, on the bundled model: what each of them does, and mistakes that must not pass in silence."""

from __future__ import annotations

from typing import Any

import pytest

from miniinfer import LLM, SamplingParams

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
