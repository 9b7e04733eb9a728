"""Fill in the middle: a prompt and the text after it, as code models were trained to see both. Owns the formats; routes are openai.py's."""

from __future__ import annotations

from typing import NamedTuple

from miniinfer.engine.text import Tokenizer


class Format(NamedTuple):
    """The tokens before the prompt, between prompt and suffix, and after both, where the model begins."""

    before: str
    between: str
    after: str


FORMATS = (
    Format("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder
    Format("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    Format("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Format("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)


def can_infill(tokenizer: Tokenizer | None) -> bool:
    """Has the tokenizer tokens for it."""
    return tokenizer is not None and any(all(tokenizer.token_id(token) is not None for token in format) for format in FORMATS)


def infill_ids(tokenizer: Tokenizer | None, prefix: list[int], suffix: list[int]) -> list[int]:
    """The token ids of a prompt, and of what comes after the gap, put together. ValueError if the tokenizer has no such format."""
    for format in FORMATS if tokenizer is not None else ():
        ids = [tokenizer.token_id(token) for token in format]  # type: ignore[union-attr]
        if (found := [i for i in ids if i is not None]) and len(found) == len(format):
            before, between, after = found
            return [before, *prefix, between, *suffix, after]
    raise ValueError("suffix: the model's tokenizer has no tokens for filling in the middle (<|fim_prefix|> and its like)")
