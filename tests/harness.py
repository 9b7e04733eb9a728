"""The oracle of the engine's tests: a tiny model, naive generation without cache, scheduler or batching, and runs of the real engine to compare.

A naive run recomputes the whole sequence for every token, alone, with the reference ops, and applies the sampling rules one by one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from miniinfer.batch import Batch
from miniinfer.config import EngineConfig
from miniinfer.data import Add, SamplingParams, SequenceUpdate
from miniinfer.engine.core import EngineCore
from miniinfer.engine.guidance import Backend, Matcher
from miniinfer.kernels import REFERENCE
from miniinfer.kernels.reference import sample

VOCAB = 131
SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
HYBRID = {**SHAPE, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
SLIDING = {**SHAPE, "architectures": ["MistralForCausalLM"], "sliding_window": 24}
MOE = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
# Large enough for the kernels that are written for Hopper.
WIDE = {**SHAPE, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
WIDE_MOE = {**MOE, **{key: WIDE[key] for key in WIDE if key != "architectures"}, "num_experts": 32, "moe_intermediate_size": 256}


def tokenizer_json(size: int, eos: int) -> str:
    """A vocabulary for grammars to speak of: the printable characters, then pairs of letters."""
    pairs = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    texts = iter([*map(chr, range(33, 127)), "\u0120", *pairs])  # U+0120: how byte-level vocabularies write a blank
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>" if i == eos else next(texts): i for i in range(size)}, []))
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return backend.to_str()


def make_core(folder: Path, shape: dict[str, Any] = SHAPE, **options: Any) -> EngineCore:
    """An engine over random fp32 weights, large enough that every token depends on the whole context."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text(tokenizer_json(shape["vocab_size"], shape["eos_token_id"]))
    defaults: dict[str, Any] = {"device": "cpu", "kernels": "reference", "page_size": 8, "num_threads": 1, "max_num_seqs": 16, "cpu_kv_gib": 0.02}
    config = EngineConfig(model=str(folder), load_format="dummy", dtype="float32", **{**defaults, **options})
    core = EngineCore(config)
    core.grammars.guard = None  # starting one takes longer than most tests; test_grammar.py has them
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in core.model.parameters():
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(values.to(parameter.device))
    return core


@dataclasses.dataclass
class Wanted:
    """One request of a scenario."""

    prompt: list[int]
    params: SamplingParams
    priority: int = 0


@dataclasses.dataclass
class Got:
    """What became of it."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    finish: str | None = None
    cached: int = 0


def run(core: EngineCore, wanted: list[Wanted], *, stagger: int = 0, prefix: str = "r") -> list[Got]:
    """Runs requests through the engine to their end, `stagger` steps between arrivals; n > 1 gives one entry per sample. Checks invariants."""
    got: dict[str, Got] = {}
    queue: list[Add] = []
    for i, w in enumerate(wanted):
        for k in range(w.params.n):
            name = f"{prefix}{i}#{k}"
            got[name] = Got()
            group = f"{prefix}{i}" if w.params.n > 1 else None
            queue.append(Add(name, list(w.prompt), w.params, w.priority, group))
    steps = 0
    while queue or core.has_work:
        while queue and (not stagger or steps % stagger == 0):
            _record(got, core.add(queue.pop(0)))
            if stagger:
                break
        _record(got, core.step())
        core.scheduler.check()
        steps += 1
        assert steps < 20000, "the engine makes no progress"
    return list(got.values())


def _record(got: dict[str, Got], updates: list[SequenceUpdate]) -> None:
    for u in updates:
        g = got[u.id]
        assert g.finish is None, "an update after the end"
        g.tokens += u.token_ids
        g.logprobs += u.logprobs or []
        g.prompt_logprobs = u.prompt_logprobs or g.prompt_logprobs
        g.cached = max(g.cached, u.cached_tokens)
        g.finish = u.finish_reason


def allowed(matcher: Matcher, held: set[int]) -> torch.Tensor:
    """Which tokens a grammar lets follow [VOCAB]; those held back only if nothing else may."""
    mask = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
    Backend.fill(None, [(matcher, 0)], mask)  # type: ignore[arg-type]  # one row needs nothing of the backend
    bits = torch.from_numpy(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]).bool()
    rest = bits.clone()
    rest[list(held)] = False
    return rest if rest.any() else bits


@torch.inference_mode()
def naive(core: EngineCore, w: Wanted, sibling: int = 0) -> Got:
    """The same request, computed the slow way."""
    p, model, device = w.params, core.model, core.runner.device
    tokens, got = list(w.prompt), Got()
    limit = min(len(tokens) + (p.max_tokens or 10**9), core.config.max_model_len or 0)
    stops = set(p.stop_token_ids or []) | (set() if p.ignore_eos else set(core.info["eos_token_ids"]))
    matcher = Backend(Path(core.info["folder"]), VOCAB, core.info["eos_token_ids"]).compile(p.structured_outputs) if p.structured_outputs else None
    while True:
        logits = model.logits(model(Batch.packed([tokens], REFERENCE, device))).float()
        if got.prompt_logprobs is None and p.prompt_logprobs is not None:
            logs = logits.log_softmax(-1)
            got.prompt_logprobs = [float(logs[i, tokens[i + 1]]) for i in range(len(w.prompt) - 1)]
        raw = logits[-1].clone()
        z = raw.clone()
        for token, value in (p.logit_bias or {}).items():
            z[token] += value
        early = len(tokens) - len(w.prompt) < p.min_tokens
        if matcher is not None:
            held = (stops if early else set()) | set(core.info["eos_token_ids"] if early or p.ignore_eos else ())
            z[~allowed(matcher, held).to(device)] = float("-inf")
        elif early:
            z[list(stops)] = float("-inf")
        seen, output = set(tokens), tokens[len(w.prompt) :]
        for token in seen:
            z[token] = z[token] / p.repetition_penalty if z[token] > 0 else z[token] * p.repetition_penalty
        for token in set(output):
            z[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty

        def one(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=device)

        token = int(
            sample(
                z.unsqueeze(0), one(p.temperature), one(max(p.top_k, 0), torch.int32), one(p.top_p), one(p.min_p),
                one((p.seed or 0) + sibling, torch.int64), one(len(tokens), torch.int32), True,
            )
        )  # fmt: skip
        tokens.append(token)
        got.tokens.append(token)
        got.logprobs.append(float(raw.log_softmax(-1)[token]))
        if token in stops and len(got.tokens) > p.min_tokens - 1:
            got.finish = "stop"
        elif matcher is not None and (not matcher.accept(token) or matcher.finished):
            got.finish = "error" if matcher.error else "stop"
        elif len(tokens) >= limit:
            got.finish = "length"
        if got.finish:
            return got
