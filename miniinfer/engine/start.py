"""Start-up: from a checkpoint to a runner whose first step is as fast as any other.

Owns the order of things. Kernels depend on a model's shape, not on its weights, so on a GPU they are compiled while the weights are read:
a dry run over the shapes that steps can have finds them (kernels/triton/rehearsal.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from miniinfer.config import ConfigError, EngineConfig, ModelConfig
from miniinfer.data import RowInit, SamplingParams, StepPlan
from miniinfer.engine import sampler
from miniinfer.engine.arena import Wanted
from miniinfer.engine.graphs import DRAW, FILTERED_DRAW, HIDDEN, Shape
from miniinfer.engine.rows import FILTERED, PENALIZED
from miniinfer.engine.runner import GIB, Runner, synchronize
from miniinfer.engine.sleep import Memory
from miniinfer.kernels import Ops
from miniinfer.models import registry, weights
from miniinfer.models.decoder import Block, Decoder

Progress = Callable[[int, int], None]

CONTEXT_BYTES = 1 << 30  # more than a CUDA context takes


def start(
    folder: Path, shape: ModelConfig, config: EngineConfig, ops: Ops, device: torch.device, progress: Progress | None, begin: float
) -> tuple[Runner, dict[str, float]]:
    """A runner with its weights and, on a GPU, its kernels; and how many seconds after `begin` (of time.perf_counter) each stage was done.

    ConfigError if the model cannot fit, or a tensor is missing, extra or misshapen."""
    done = {"device": synchronize(device) - begin}
    others = _in_use(device)
    memory = Memory(device) if config.enable_sleep_mode else None
    model = _build(shape, config, device, memory)
    done["memory"] = synchronize(device) - begin

    def fill() -> None:
        _read(model, folder, config, progress)
        done["weights"] = synchronize(device) - begin

    def again() -> None:
        _read(model, folder, config, None)
        _pack(model, ops)

    if ops.name != "triton":
        fill()
        _pack(model, ops)
        if memory is not None:
            memory.reload, memory.forget = again, model.unpack
        runner = Runner(config, model, ops, device, memory)
        done["ready"] = synchronize(device) - begin
        return runner, done
    _pack(model, ops)  # rearranges nothing, so the values may follow
    if memory is not None:
        memory.reload = partial(_read, model, folder, config, None)
    runner = Runner(config, model, ops, device, memory, others)
    with ThreadPoolExecutor(1, "weights") as side:
        loading = side.submit(fill)
        rehearse(runner)
        done["kernels"] = time.perf_counter() - begin
        loading.result()
    first_steps(runner)
    done["ready"] = synchronize(device) - begin
    return runner, done


def _in_use(device: torch.device) -> int:
    """Bytes of the GPU that other processes have, so that several models can share it; what is this process's context is not told apart."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - CONTEXT_BYTES)


def _build(shape: ModelConfig, config: EngineConfig, device: torch.device, memory: Memory | None) -> Decoder:
    """The model without values, on the device; its parameters lie in `memory`, if there is one."""
    dtype = getattr(torch, config.dtype)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = shape.num_parameters * dtype.itemsize
        if needed > free:
            raise ConfigError(f"model: {config.model} needs {needed / GIB:.1f} GiB for its weights, but the GPU has {free / GIB:.1f} GiB free")
    take = None
    if memory is not None:
        wanted = Wanted()
        registry.build(shape, dtype, "cpu", 1, wanted.take)
        memory.make_weights(wanted.size)
        take = memory.weights.take
    return registry.build(shape, dtype, device, config.max_model_len, take).eval().requires_grad_(False)


def _read(model: Decoder, folder: Path, config: EngineConfig, progress: Progress | None) -> None:
    """The weights' values."""
    if config.load_format == "dummy":
        weights.init_dummy(model, config.seed)
    else:
        weights.load(model, folder, progress)


def _pack(model: Decoder, ops: Ops) -> None:
    if ops.pack_linear is not None:
        try:
            model.pack(ops.pack_linear, ops.pack_gated, ops.pack_into_norm, ops.pack_chain)
        except RuntimeError as e:  # only products of a fixed order refuse a weight
            raise ConfigError(f"deterministic: {e}") from e


def shapes(runner: Runner) -> list[Shape]:
    """Steps that between them launch the kernels of nearly all others: prompts alone and beside decodes, then decodes."""
    config, longest = runner.config, runner.max_length
    assert config.max_num_batched_tokens and config.max_num_seqs
    prompts = [Shape(n, b, n, longest, DRAW) for n in _sizes(config.max_num_batched_tokens)[2:] for b in (1, 2) if b <= config.max_num_seqs]
    decodes = [Shape(n, n, 1, longest, DRAW) for n in _sizes(config.max_num_seqs)]
    return [*prompts, *decodes, *(Shape(n, n, 1, longest, FILTERED_DRAW) for n in (config.max_num_seqs, 1)), Shape(1, 1, 1, longest, HIDDEN)]


def _sizes(limit: int) -> list[int]:
    """Close together where kernels differ by size, and beyond 2048 they do not."""
    return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 576, 1024, 2048) if n < limit] + [limit]


@torch.inference_mode()
def rehearse(runner: Runner) -> None:
    """Compiles and loads the kernels that steps will launch. No kernel of ours runs, so neither rows nor KV pages change; what torch itself
    computes on the way goes nowhere."""
    from miniinfer.kernels.triton.rehearsal import rehearsal  # Triton is there if these kernels are

    model, rows, longest = runner.model, runner.rows, runner.max_length
    runner.model = _excerpt(model)
    try:
        with rehearsal():
            for shape in shapes(runner):
                hidden = runner.graphs.step(shape)
            logits = runner.model.logits(hidden)
            words, which = (torch.zeros(1, n, dtype=torch.int32, device=logits.device) for n in (-(-logits.shape[1] // 32), 1))
            runner.ops.apply_bitmask(logits, words, which[0])
            for flags in (PENALIZED, PENALIZED | FILTERED):
                sampler.sample(logits, rows, rows.sample_rows[:1], rows.sample_positions[:1], flags, longest, runner.ops)
            runner.copy_pages([(kind, 0, 0) for kind in range(len(runner.kinds))])
    finally:
        runner.model = model


def _excerpt(model: Decoder) -> Decoder:
    """The same modules, but only two layers of each kind, which launch what all do. The model itself stays whole: its weights are being read."""
    kinds: dict[tuple[type, int], list[Block]] = {}
    for layer in model.layers:
        block = cast(Block, layer)
        kinds.setdefault((type(block.mlp), block.attention.window), []).append(block)
    excerpt = copy.copy(model)
    excerpt._modules = {**model._modules, "layers": nn.ModuleList(block for alike in kinds.values() for block in alike[:2])}
    return excerpt


def first_steps(runner: Runner) -> None:
    """A prompt and a token of the row that belongs to nobody, in the page that belongs to nobody: the libraries' own start-up, the first graph."""
    row = runner.rows.dummy
    init = RowInit(row, [0] * 8, 8, 0, SamplingParams(), [])
    for start, count, inits in ((0, 8, [init]), (8, 1, [])):
        runner.launch(StepPlan(0, [row], [start], [count], [True], inits, [], [])).result()
