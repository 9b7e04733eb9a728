"""Runner: turns step plans into tokens on one device.

Owns the model, the KV caches, the device rows and the fixed buffers of a forward pass. Executes a StepPlan to the letter and knows nothing
of requests, queues or the prefix tree. `launch` returns before a GPU is done; `Pending.result` waits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miniinfer.batch import Batch, StateView
from miniinfer.config import ConfigError, EngineConfig, ModelConfig
from miniinfer.data import StepPlan, StepResult, TokenLogprobs
from miniinfer.engine import sampler
from miniinfer.engine.graphs import DRAW, FILTERED_DRAW, HIDDEN, Graphs, Shape
from miniinfer.engine.rows import BIASED, FILTERED, PENALIZED, Rows, to_device
from miniinfer.engine.sleep import Memory
from miniinfer.kernels import Ops
from miniinfer.models.decoder import Decoder
from miniinfer.utils import get_logger

log = get_logger(__name__)

GIB = 2**30
LAUNCH_SECONDS = 300e-6  # host time of a layer's launches, measured with triton 3.6
FLOPS = 5e14  # per second, of a whole step of prompts on an H200
LOGITS_AT_ONCE = 128  # rows whose logits are in memory in fp32, for log-probabilities, penalties and the like
SPARE = 0.02  # of a GPU's memory, left to whoever shares it


@dataclass(slots=True)
class Pending:
    """A launched step: `result` waits for its copies to the host and reads them. The buffers are used again two steps on.

    With constrained entries the step ends before its draws: `undrawn`, until Runner.draw."""

    plan: StepPlan
    tokens: np.ndarray  # int32 on the host, one per entry whether it samples or not; valid once `done`
    done: torch.cuda.Event | None
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    prompt: dict[int, list[tuple[Tensor, Tensor, Tensor]]] | None = None
    pooled: dict[int, Tensor] | None = None
    undrawn: tuple[Tensor, int] | None = None  # hidden states and the rows' flags

    def result(self) -> StepResult:
        """The sampled tokens, aligned with the plan's entries."""
        if self.done is not None:
            self.done.synchronize()
        plan = self.plan
        tokens = [[token] if sampled else [] for token, sampled in zip(self.tokens.tolist(), plan.samples, strict=True)]
        result = StepResult(step=plan.step, tokens=tokens)
        if self.logprobs is not None:
            result.logprobs = [[each] if s else [] for each, s in zip(_token_logprobs(*self.logprobs), plan.samples, strict=True)]
        if self.prompt is not None:
            result.prompt_logprobs = {b: [t for chunk in chunks for t in _token_logprobs(*chunk)] for b, chunks in self.prompt.items()}
        if self.pooled is not None:
            result.pooled = {b: sums.tolist() for b, sums in self.pooled.items()}
        return result


def _token_logprobs(ids: Tensor, values: Tensor, ranks: Tensor) -> list[TokenLogprobs]:
    return [TokenLogprobs(*each) for each in zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)]


class Runner:
    """One device's share of the engine. `config` is resolved; `model` has its weights. With `memory` KV pages lie there, too."""

    def __init__(self, config: EngineConfig, model: Decoder, ops: Ops, device: torch.device, memory: Memory | None = None, others: int = 0) -> None:
        """`others`: bytes of the GPU that were in use before this engine began."""
        assert config.max_num_seqs and config.max_num_batched_tokens and config.max_model_len and config.page_size
        self.config, self.model, self.ops, self.device, self.memory = config, model, ops, device, memory
        self.max_length = config.max_model_len
        shape: ModelConfig = model.config
        self.kinds = shape.state_kinds
        self.num_pages = plan_pages(config, shape, device, others)
        self.caches = self._make_caches(shape, config.page_size)
        self.rows = Rows(config.max_num_seqs, config.max_model_len, config.page_size, len(self.kinds), device)
        size = config.max_num_batched_tokens + config.max_num_seqs  # a decode batch is padded beyond the budget at most by dummies

        def buffer(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int32, device=device)

        self.ids, self.positions, self.lengths = buffer(size), buffer(size), buffer(config.max_num_seqs + 1)
        self.slots = [buffer(size) for _ in self.kinds]
        # With --deterministic attention must not tell whether a step's other requests want all of their hidden states.
        self._alone = None if config.deterministic else torch.arange(config.max_num_seqs + 1, dtype=torch.int32, device=device)
        # Reference ops ask the device for sizes, which a capture forbids.
        graphs = device.type == "cuda" and not config.enforce_eager and ops.name == "triton"
        self.graphs = Graphs(self._step, config.max_num_seqs, graph_tokens(config, shape), self.max_length, graphs)
        self._results = _Results(config.max_num_seqs, device)

    def _make_caches(self, shape: ModelConfig, page_size: int) -> list[tuple[Tensor, Tensor]]:
        """K and V per layer, zeroed: attention multiplies masked entries by 0, and 0 times a stale NaN would be NaN."""
        dtype = self.model.embed.weight.dtype
        layers = [(2, self.num_pages[self.kinds.index(window)], shape.num_kv_heads, page_size, shape.head_dim) for window in shape.windows]
        made = self.memory.make_kv(layers, dtype) if self.memory is not None else [_zeros(layer, dtype, self.device) for layer in layers]
        return [(both[0], both[1]) for both in made]

    # ------------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Starts a step. On a GPU it returns at once; nothing in here waits for the device."""
        real, tokens = len(plan.rows), plan.num_tokens
        padded = None if plan.prompt_logprobs or plan.pooled else self.graphs.pad(tokens, real)
        pending = self._results.begin(plan)
        self.copy_pages(plan.copies)
        flags = self.rows.write(plan, padded[1] if padded else real)
        samples = any(plan.samples)
        plain = not flags & (PENALIZED | BIASED) and not plan.constrained
        draws = samples and plain and not plan.prompt_logprobs and plan.logprobs < 0
        ending = HIDDEN if not draws else FILTERED_DRAW if flags & FILTERED else DRAW
        if padded:
            shape = Shape(*padded, 1 if tokens == real else padded[0], self.max_length, ending)
            output = self.graphs.run(shape)
        else:
            longest = max(s + c for s, c in zip(plan.starts, plan.counts, strict=True))
            shape = Shape(tokens, real, max(plan.counts), longest, ending)
            every = bool(plan.prompt_logprobs or plan.pooled)
            hidden = self._forward(shape, every)
            output = self._end(shape, hidden.index_select(0, self.rows.sample_at[:real]) if every else hidden)
        if plan.prompt_logprobs:
            pending.prompt = self._prompt_logprobs(plan, hidden)
        if plan.pooled:
            ends = np.cumsum(plan.counts)
            pending.pooled = {b: self._to_host(hidden[ends[b] - count : ends[b]].sum(0, dtype=torch.float32)) for b, count in plan.pooled}
        if plan.constrained:
            pending.undrawn = output, flags
            return pending
        if samples and not draws:
            self._sample(plan, output, flags, pending)
        if pending.done is not None:
            pending.done.record()
        return pending

    @torch.inference_mode()
    def draw(self, pending: Pending, masks: np.ndarray) -> None:
        """The rest of a step with constrained entries, before the next `launch`. `masks` [constrained entries, W] int32 as apply_bitmask takes them,
        in pinned memory that stays as it is until the step is over."""
        assert pending.undrawn is not None
        output, flags = pending.undrawn
        pending.undrawn = None
        which = np.full(len(pending.plan.rows), -1, dtype=np.int32)
        which[pending.plan.constrained] = np.arange(len(masks))
        bound = torch.from_numpy(masks).to(self.device, non_blocking=True), to_device(torch.from_numpy(which), self.device)
        self._sample(pending.plan, output, flags, pending, bound)
        if pending.done is not None:
            pending.done.record()

    def copy_pages(self, copies: list[tuple[int, int, int]]) -> None:
        """Copies whole KV pages in every layer of a kind: (kind, source, destination) each."""
        for kind, window in enumerate(self.kinds):
            pairs = [(source, destination) for k, source, destination in copies if k == kind]
            if pairs:
                sources, destinations = (to_device(torch.tensor(pages, dtype=torch.int32), self.device) for pages in zip(*pairs, strict=True))
                layers = [c for c, w in zip(self.caches, self.model.config.windows, strict=True) if w == window]
                self.ops.copy_pages(layers, sources, destinations)

    def _step(self, shape: Shape) -> Tensor:
        """A whole step over the fixed buffers, which is what graphs capture."""
        return self._end(shape, self._forward(shape))

    def _forward(self, shape: Shape, every: bool = False) -> Tensor:
        """Builds the inputs from the rows, on the device, and runs the model: hidden states of the tokens that may be sampled behind, one for each
        sequence [B, hidden], or of `every` token [tokens, hidden]."""
        rows, size, batch_size, num_tokens = self.rows, self.config.page_size or 0, shape.sequences, shape.tokens
        batch_rows, query_start = rows.batch_rows[:batch_size], rows.query_start[: batch_size + 1]
        ids, positions, lengths = self.ids[:num_tokens], self.positions[:num_tokens], self.lengths[:batch_size]
        slots = [s[:num_tokens] for s in self.slots]
        self.ops.stage(*rows.staging)
        self.ops.step_inputs(
            rows.tokens, batch_rows, rows.starts[:batch_size], query_start, num_tokens, rows.page_tables, size, ids, positions, lengths, slots
        )
        kinds = tuple(StateView(s, table, size) for s, table in zip(slots, rows.page_tables, strict=True))
        batch = Batch(ids, positions, query_start, lengths, batch_rows, shape.max_query, shape.max_length, self.ops, kinds, self.caches)
        if shape.max_query > 1 and not every:
            batch.wanted, batch.alone = rows.sample_at[:batch_size], self._alone[: batch_size + 1] if self._alone is not None else None
        return self.model(batch)

    def _end(self, shape: Shape, hidden: Tensor) -> Tensor:
        """What the shape ends with, for each of its sequences: hidden states [B, hidden] or tokens [B]. One that does not sample computes them
        too and draws for the dummy row."""
        rows, size = self.rows, shape.sequences
        if shape.ending == HIDDEN:
            return hidden
        flags = FILTERED if shape.ending == FILTERED_DRAW else 0
        logits = self.model.logits(hidden)
        tokens = sampler.sample(logits, rows, rows.sample_rows[:size], rows.sample_positions[:size], flags, shape.max_length, self.ops)
        self.ops.deliver(tokens, self._results.host, rows.turns)
        return tokens

    def _sample(self, plan: StepPlan, hidden: Tensor, flags: int, pending: Pending, bound: tuple[Tensor, Tensor] | None = None) -> None:
        """Draws behind a step that ended with hidden states: what is too rare or too varied for graphs. `bound`: masks, and which entry has which."""
        rows, real = self.rows, len(plan.rows)
        logits = self.model.logits(hidden)[:real]
        longest = max(s + c for s, c in zip(plan.starts, plan.counts, strict=True))
        tokens, found = [], []
        for lo in range(0, real, LOGITS_AT_ONCE):
            part = slice(lo, min(lo + LOGITS_AT_ONCE, real))
            allowed = logits[part] if bound is None else self.ops.apply_bitmask(logits[part], bound[0], bound[1][part])
            tokens.append(sampler.sample(allowed, rows, rows.sample_rows[part], rows.sample_positions[part], flags, longest, self.ops))
            if plan.logprobs >= 0:
                found.append(sampler.logprobs(logits[part], tokens[-1], plan.logprobs))
        self.ops.deliver(torch.cat(tokens) if len(tokens) > 1 else tokens[0], self._results.host, rows.turns)
        if found:
            ids, values, ranks = (torch.cat(parts) for parts in zip(*found, strict=True))
            pending.logprobs = self._to_host(ids), self._to_host(values), self._to_host(ranks)

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
        """For each entry that wants them: log-probabilities of the known token after every position computed in this step."""
        starts = np.concatenate([[0], np.cumsum(plan.counts)])
        found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for b in plan.prompt_logprobs:
            row, start = plan.rows[b], plan.starts[b]
            count = min(plan.counts[b], int(self.rows.prompt_lens[row]) - 1 - start)
            chunks = found.setdefault(b, [])
            for lo in range(0, count, LOGITS_AT_ONCE):
                hi = min(lo + LOGITS_AT_ONCE, count)
                logits = self.model.logits(hidden[starts[b] + lo : starts[b] + hi])
                targets = self.rows.tokens[row, start + lo + 1 : start + hi + 1]
                ids, values, ranks = sampler.logprobs(logits, targets, int(self.rows.prompt_logprobs[row]))
                chunks.append((self._to_host(ids), self._to_host(values), self._to_host(ranks)))
        return found

    def _to_host(self, value: Tensor) -> Tensor:
        """A copy in pinned memory, valid once the step's event is reached; on the CPU the tensor itself."""
        if self.device.type != "cuda":
            return value
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)


class _Results:
    """Where sampled tokens arrive on the host: two buffers by turns, since a step's are read while the next one runs."""

    def __init__(self, size: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.host = torch.zeros(2, size, dtype=torch.int32, pin_memory=gpu)
        self.views = list(self.host.numpy())
        self.done = [torch.cuda.Event() if gpu else None for _ in range(2)]
        self.turn = 0

    def begin(self, plan: StepPlan) -> Pending:
        """The result to be of a step that starts now. Waits for the step before last, which is over long since if its result was read."""
        turn, self.turn = self.turn, self.turn ^ 1
        done = self.done[turn]
        if done is not None:
            done.synchronize()
        return Pending(plan, self.views[turn][: len(plan.rows)], done)


# --------------------------------------------------------------------------------------------------------- memory


def workspace_bytes(config: EngineConfig, shape: ModelConfig) -> int:
    """An upper estimate of a step's temporaries: activations of the token budget, partial results of split decode attention, and logits with
    what sampling makes of them."""
    assert config.max_num_batched_tokens and config.max_num_seqs
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    wide = 3 * max(shape.intermediate_size, shape.experts_per_token * shape.expert_intermediate_size)
    tokens = config.max_num_batched_tokens + graph_tokens(config, shape)  # graphs have memory of their own
    activations = tokens * (6 * shape.hidden_size + 2 * heads + wide) * 2
    partial = config.max_num_seqs * shape.num_heads * max(4, 256 // shape.num_kv_heads) * (shape.head_dim + 2) * 4
    # Logits in 16 bits of an eager step and of graphs, and up to eight fp32 tensors of as many rows as are handled at once.
    logits = shape.vocab_size * (2 * config.max_num_seqs * 2 + 8 * LOGITS_AT_ONCE * 4)
    return activations + partial + logits


def graph_tokens(config: EngineConfig, shape: ModelConfig) -> int:
    """Up to how many tokens a step with prompts in it is a graph: those that a GPU computes faster than the host can launch them. Small models
    gain several times over; to large ones, padding would cost more than it brings."""
    assert config.max_num_batched_tokens
    inactive = sum(shape.moe_layers) * (shape.num_experts - shape.experts_per_token) * 3 * shape.hidden_size * shape.expert_intermediate_size
    flops = 2 * (shape.num_parameters - shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2) - inactive)
    return min(config.max_num_batched_tokens, int(shape.num_layers * LAUNCH_SECONDS * FLOPS / flops))


def plan_pages(config: EngineConfig, shape: ModelConfig, device: torch.device, others: int) -> list[int]:
    """KV pages per state kind, from the memory that the options grant and the weights leave; ConfigError if not even one request fits.

    A sliding kind gets no more than its rows' windows can fill while full ones go without."""
    assert config.max_num_seqs and config.max_model_len and config.page_size and config.max_num_batched_tokens
    size, element = config.page_size, torch.empty((), dtype=getattr(torch, config.dtype)).element_size()
    per_layer = 2 * shape.num_kv_heads * shape.head_dim * element * size
    page_bytes = [per_layer * shape.windows.count(window) for window in shape.state_kinds]
    whole = -(-config.max_model_len // size) + 1  # pages of a request at its limit
    spans = [min(whole, (w + config.max_num_batched_tokens) // size + 4) if w else whole for w in shape.state_kinds]
    if config.num_pages is not None:
        pages, granted, source = [config.num_pages] * len(spans), "", "num_pages"
    else:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            own = total - free - others
            budget = int(min(config.gpu_memory_utilization * total - own, free - SPARE * total)) - workspace_bytes(config, shape)
            source = "gpu_memory_utilization"
        else:
            every_row = sum(b * (config.max_num_seqs * s + 2) for b, s in zip(page_bytes, spans, strict=True))
            budget, source = min(int(config.cpu_kv_gib * GIB), every_row), "cpu_kv_gib"
        pages, granted = _share(budget, page_bytes, [config.max_num_seqs * s + 2 for s in spans]), f" in {max(budget, 0) / GIB:.2f} GiB"
    if any(p < span + 1 for p, span in zip(pages, spans, strict=True)):
        needed = sum(b * (s + 1) for b, s in zip(page_bytes, spans, strict=True)) / GIB
        raise ConfigError(
            f"{source}: room for {max(min(pages), 0)} KV pages of {size} tokens{granted}, but one request of max_model_len={config.max_model_len} "
            f"tokens needs {max(spans) + 1} ({needed:.2f} GiB); raise {source} or lower max_model_len"
        )
    return pages


def _share(budget: int, page_bytes: list[int], limits: list[int]) -> list[int]:
    """Splits bytes into equal numbers of pages per kind, sliding ones up to their limit; the first kind (full attention, if any) gets the rest."""
    even = budget // sum(page_bytes)
    if len(page_bytes) == 1:
        return [even]
    capped = [min(even, limit) for limit in limits[1:]]  # full attention comes first in state_kinds
    rest = budget - sum(p * b for p, b in zip(capped, page_bytes[1:], strict=True))
    return [rest // page_bytes[0], *capped]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on the CPU take memory only once they are written to (calloc, which torch.zeros does not use)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def synchronize(device: torch.device) -> float:
    """Waits for the device; returns the clock, so that start-up logs measure what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
