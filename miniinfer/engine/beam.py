"""Beam search over an engine's public interface: every round extends each beam by its likeliest tokens, which come as log-probabilities.

Owns the search alone: which prompts to run next, and what becomes of their results. LLM and the server run them; the prefix cache makes a
round cost one new token a beam. Rules and scores are those of vLLM's beam search: a score is the summed log-probability over the length of
prompt and output to the power `length_penalty`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from miniinfer.data import MAX_LOGPROBS, CompletionOutput, Logprob, SamplingParams
from miniinfer.engine.text import Detokenizer, Tokenizer

MAX_WIDTH = MAX_LOGPROBS // 2  # a round looks at twice as many tokens a beam, since some end it

Table = dict[int, Logprob]


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search. Names are vLLM's. ValueError, naming the field, on a bad value."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # keep the end-of-text token's text

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_WIDTH:
            raise ValueError(f"beam_width: must be from 1 to {MAX_WIDTH}, got {self.beam_width}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, got {self.max_tokens}")
        if not -100 <= self.length_penalty <= 100:
            raise ValueError(f"length_penalty: must be from -100 to 100, got {self.length_penalty}")

    def step_params(self) -> SamplingParams:
        """What a round asks of the engine for each beam."""
        return SamplingParams(max_tokens=1, temperature=0, logprobs=2 * self.beam_width, ignore_eos=True, detokenize=False)


@dataclass(frozen=True)
class Beam:
    """A continuation. An end-of-text token that ended it is part of it."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Table, ...] = ()
    cum_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class BeamSearch:
    """One prompt's search: run `prompts`, give the results to `advance`, until `done`; `best` are the answers."""

    prompt: list[int]
    params: BeamSearchParams
    eos: Collection[int]
    max_model_len: int
    stop_ids: Collection[int] = ()
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return not self.beams

    def prompts(self) -> list[list[int]]:
        """What to continue by a token, in the order in which `advance` wants the results."""
        return [[*self.prompt, *beam.token_ids] for beam in self.beams]

    def advance(self, tables: Sequence[Table]) -> None:
        """Takes each beam's likeliest next tokens."""
        grown: list[Beam] = []
        for beam, table in zip(self.beams, tables, strict=True):
            for token, found in table.items():
                longer = Beam((*beam.token_ids, token), (*beam.logprobs, table), beam.cum_logprob + found.logprob)
                if token in self.stop_ids or (token in self.eos and not self.params.ignore_eos):
                    self.ended.append(replace(longer, finish_reason="stop", stop_reason=token if token in self.stop_ids else None))
                else:
                    grown.append(longer)
        grown = sorted(grown, key=self.score, reverse=True)[: self.params.beam_width]
        length = len(grown[0].token_ids) if grown else 0
        if length >= self.params.max_tokens or len(self.prompt) + length >= self.max_model_len:
            self.ended += [replace(beam, finish_reason="length") for beam in grown]
            grown = []
        self.beams = grown

    def score(self, beam: Beam) -> float:
        """What beams are compared by; the token that ended one does not count for its length."""
        length = len(self.prompt) + len(beam.token_ids) - (beam.finish_reason == "stop")
        return float(beam.cum_logprob / length**self.params.length_penalty)

    def best(self, tokenizer: Tokenizer | None, logprobs: int | None = None, skip_special_tokens: bool = True) -> list[CompletionOutput]:
        """The best `beam_width`, likeliest first; with `logprobs`, each token's own and so many alternatives."""
        outputs = []
        for index, beam in enumerate(sorted(self.ended, key=self.score, reverse=True)[: self.params.beam_width]):
            ids = list(beam.token_ids)
            shown = ids[:-1] if beam.finish_reason == "stop" and not self.params.include_stop_str_in_output else ids
            text = "" if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens, self.prompt).push(shown)
            tables = None if logprobs is None else [_narrowed(table, token, logprobs) for table, token in zip(beam.logprobs, ids, strict=True)]
            outputs.append(CompletionOutput(index, text, ids, beam.cum_logprob, tables, beam.finish_reason, beam.stop_reason))
        return outputs


def _narrowed(table: Table, token: int, alternatives: int) -> Table:
    """The token itself, and then the likeliest."""
    return {token: table[token]} | dict(sorted(table.items(), key=lambda entry: -entry[1].logprob)[:alternatives])
