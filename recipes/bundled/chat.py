"""From a conversation to tokens, through the checkpoint's own tokenizer and chat template: training sees exactly what serving sends.

Owns the loss mask (the assistant's tokens and their end of turn). Rendering is miniinfer.engine.text's, the same that the server uses.
"""

from __future__ import annotations

import re
from pathlib import Path

from sample import Sample

from miniinfer.engine.text import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "miniinfer" / "assets" / "bundled"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
END_OF_TEXT, IM_START, IM_END = 0, 1, 2  # ids: the tokenizer is made with the specials first

REMEMBERED = 100_000  # pieces: made-up words would fill the memory of many processes

_SPECIAL = re.compile("(" + "|".join(re.escape(name) for name in SPECIALS) + ")")
# make_tokenizer.PIECES for text that is ASCII only
_ASCII_PIECE = re.compile(r"'(?:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class Encoder:
    """Conversations to tokens and marks of what is to be learned."""

    def __init__(self, folder: Path = ASSETS) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        head = self.tokenizer.encode("<|im_start|>assistant\n")
        if len(head) != 3 or head[0] != IM_START:
            raise ValueError(f"{folder}: the head of an assistant turn must be three tokens, it is {head}")
        self.assistant = head[1]
        self._special = {name: i for i, name in enumerate(SPECIALS)}
        self._pieces: dict[str, list[int]] = {}

    def render(self, sample: Sample) -> str:
        """The whole conversation as text."""
        return self.tokenizer.render_chat(sample.messages, sample.tools, add_generation_prompt=False)

    def prompt(self, sample: Sample) -> list[int]:
        """The tokens that a server sends to the model for the sample's last reply."""
        return self.tokenizer.encode(self.tokenizer.render_chat(sample.messages[:-1], sample.tools), add_special_tokens=False)

    def encode(self, samples: list[Sample]) -> list[tuple[list[int], list[int]]]:
        """(token ids, 1 where a token is to be learned) of each sample."""
        return [(ids, self.learned(ids)) for ids in (self.ids(self.render(s)) for s in samples)]

    def ids(self, text: str) -> list[int]:
        """The tokenizer's ids. ASCII text is cut here and its pieces are remembered: the same result, many times faster."""
        if not text.isascii():
            return self.tokenizer.encode(text, add_special_tokens=False)
        out: list[int] = []
        for segment in _SPECIAL.split(text):
            known = self._special.get(segment)
            if known is not None:
                out.append(known)
                continue
            for piece in _ASCII_PIECE.findall(segment):
                ids = self._pieces.get(piece)
                if ids is None:
                    ids = self.tokenizer.encode(piece, add_special_tokens=False)
                    if len(self._pieces) < REMEMBERED:
                        self._pieces[piece] = ids
                out += ids
        return out

    def learned(self, ids: list[int]) -> list[int]:
        """Marks, for each turn that starts with <|im_start|>assistant and a newline, the tokens after that head up to and with <|im_end|>."""
        marks, at = [0] * len(ids), 0
        while IM_START in ids[at:]:
            at = ids.index(IM_START, at) + 1
            if ids[at] == self.assistant:
                end = ids.index(IM_END, at) + 1
                marks[at + 2 : end] = [1] * (end - at - 2)
        return marks
