"""Every kernel that steps of a few models launch, compiled for a Hopper GPU by the installed Triton, without a GPU. A script, for Triton's driver and
the functions that look for a GPU are replaced: tests/cpu/test_kernels_compile.py runs it. Prints JSON: what compiled, by name and how often, and
what did not, with Triton's words."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from harness import WIDE, WIDE_MOE
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from miniinfer.config import EngineConfig
from miniinfer.engine.core import EngineCore
from miniinfer.engine.graphs import DRAW, FILTERED_DRAW, Shape
from miniinfer.kernels import Ops
from miniinfer.kernels import triton as overlay
from miniinfer.kernels.triton import chain_hopper, experts, hopper_launch, linear_hopper, matmul_hopper, pdl

SHARED_MEMORY = 232_448  # bytes that a program can have on Hopper
STEPS = [(1, 1, 1, DRAW), (2, 2, 1, FILTERED_DRAW), (48, 48, 1, DRAW), (700, 2, 512, DRAW)]  # tokens, sequences, longest query, ending


class Hopper:
    """Stands in for Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend() -> None:
    """What looks for a GPU finds one; products that are cuBLAS's are not computed."""
    driver.set_active(Hopper())
    pdl.available = lambda: True
    for module in (chain_hopper, experts, hopper_launch, linear_hopper, matmul_hopper):
        module.multiprocessors = lambda device: 132
    hopper_launch._fits = lambda q, k, v: q.element_size() == 2
    hopper_launch._zeros = lambda device, size: torch.zeros(size, dtype=torch.int32)
    experts._takes_hopper = lambda x, w13, w2: True
    torch.cuda.current_device = lambda: 0
    torch.nn.functional.linear = lambda x, w, b=None: x.new_empty(*x.shape[:-1], len(w))
    torch.Tensor.addmm_ = lambda self, *args: self


def steps(shape: dict[str, Any], folder: Path) -> None:
    """Launches of a model's steps."""
    (folder / "config.json").write_text(json.dumps(shape))
    options = {"page_size": 64, "num_pages": 40, "max_num_seqs": 48, "max_num_batched_tokens": 800, "max_model_len": 512}
    config = EngineConfig(
        model=str(folder), device="cpu", kernels="reference", load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, **options
    )
    runner = EngineCore(config).runner
    runner.ops = ops = Ops.overlay("triton", overlay)
    with torch.inference_mode():
        runner.model.pack(ops.pack_linear, ops.pack_gated, ops.pack_into_norm, ops.pack_chain)
        for tokens, sequences, longest, ending in STEPS:
            runner.graphs.step(Shape(tokens, sequences, longest, runner.max_length, ending))


def main() -> None:
    compiled: Counter[str] = Counter()
    seen: set[str] = set()
    failed: dict[str, str] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as e:
            while e.__cause__ is not None:  # the innermost says why
                e = e.__cause__
            failed[name] = f"{type(e).__name__}: {e}"
            return
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled[name] += 1
            if kernel.metadata.shared > SHARED_MEMORY:
                failed[name] = f"{kernel.metadata.shared} bytes of shared memory"

    pretend()
    chain_hopper.LEAST = 0  # these models' weights are smaller than those that chains and large products are for
    matmul_hopper.pays = lambda tokens, weight: tokens > 256
    run, JITFunction.run = JITFunction.run, compile_only
    for shape in (WIDE, WIDE_MOE):
        with tempfile.TemporaryDirectory() as folder:
            steps(shape, Path(folder))
    json.dump({"triton": triton.__version__, "compiled": compiled, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
