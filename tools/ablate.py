"""What each fast path is worth: workloads of `bench offline` with all of them on, then with one after the other off, each in a process of its own.

python tools/ablate.py --model miniinfer/bench/shapes/Qwen3-8B --workload dec1,dec32 [--off pdl,graphs]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def no_graphs() -> None:
    """Every step eager."""
    from miniinfer.engine import runner

    original = runner.Graphs.__init__
    runner.Graphs.__init__ = lambda self, *args: original(self, *args[:-1], False)  # type: ignore[method-assign]


def no_prompt_graphs() -> None:
    """Steps with prompts in them eager."""
    from miniinfer.engine import runner

    runner.graph_tokens = lambda *args: 0


def no_pdl() -> None:
    """Every kernel waits for the one before it."""
    from miniinfer.kernels.triton import pdl, sampling

    pdl.launch_options = sampling.launch_options = lambda tokens: {"PDL": False}


def no_linear() -> None:
    """cuBLAS for every linear layer, silu_mul behind it."""
    from miniinfer.kernels import triton

    triton.pack_linear = triton.pack_gated = triton.pack_into_norm = triton.pack_chain = None  # type: ignore[assignment]


def no_epilogue() -> None:
    """silu_mul as a kernel of its own."""
    from miniinfer.kernels import triton

    triton.pack_gated = None  # type: ignore[assignment]


def no_folded_norm() -> None:
    """Every norm a kernel of its own."""
    from miniinfer.kernels import triton

    triton.pack_into_norm = triton.moe_into_norm = None  # type: ignore[assignment]


def no_chain() -> None:
    """A launch for each product between two attentions."""
    from miniinfer.kernels import triton

    triton.pack_chain = None  # type: ignore[assignment]


def no_decode_attention() -> None:
    """Plain Triton for sequences with one new token."""
    from miniinfer.kernels.triton import hopper_launch

    hopper_launch.takes_decode = lambda *args: False


def no_rope_in_attention() -> None:
    """Rotation and the write into the cache as a kernel of its own."""
    from miniinfer.kernels import triton

    triton.rope_paged_attention = None  # type: ignore[assignment]


def no_prefill_attention() -> None:
    """Plain Triton for sequences with several."""
    from miniinfer.kernels.triton import hopper_launch

    hopper_launch.takes = lambda *args: False


def no_experts() -> None:
    """Plain Triton for the products of experts."""
    from miniinfer.kernels.triton import experts

    experts._takes_hopper = lambda *args: False


OFF: dict[str, Callable[[], None]] = {
    "graphs": no_graphs,
    "prompt-graphs": no_prompt_graphs,
    "pdl": no_pdl,
    "linear": no_linear,
    "epilogue": no_epilogue,
    "folded-norm": no_folded_norm,
    "chain": no_chain,
    "decode-attention": no_decode_attention,
    "rope-in-attention": no_rope_in_attention,
    "prefill-attention": no_prefill_attention,
    "experts": no_experts,
}


def run(off: str, model: str, workload: str) -> None:
    """In a child: one variant; the last line printed is bench offline's JSON."""
    from miniinfer.cli import main

    if off:
        OFF[off]()
    sys.exit(main(["bench", "offline", "--model", model, "--workload", workload, "--json"]))


def compare(model: str, workload: str, names: list[str]) -> None:
    """Prints a row for every variant: each figure, and what it is of the figure with everything on."""
    whole: dict[str, float] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])}
    for off in ["", *names]:
        done = subprocess.run(
            [sys.executable, __file__, "--model", model, "--workload", workload, "--only", off], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            print(f"{off or 'all on':18} failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        results = json.loads(done.stdout.splitlines()[-1])["results"]
        found = {f"{r['workload']} {key}": r[key] for r in results for key in ("ttft_ms", "tpot_ms", "output_tok_s") if key in r}
        whole = whole or found
        print(f"{'without ' + off if off else 'all on':26}", *(f"{k} {v:g} ({v / whole[k]:.2f})" for k, v in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", default="dec1")
    parser.add_argument("--off", default=",".join(OFF), help=f"comma list of {', '.join(OFF)} (all)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := set(asked.off.split(",")) - set(OFF):
        parser.error(f"--off: {', '.join(sorted(unknown))}: not among {', '.join(OFF)}")
    if asked.only is not None:
        run(asked.only, asked.model, asked.workload)
    compare(asked.model, asked.workload, asked.off.split(","))
