"""The op table: every operation of the engine by name, and which implementation of it runs.

`reference` defines each op in plain torch; `triton` and `cpu` overlay some of the same names, `onednn` the linear layers of a CPU that cannot
have `cpu`. A model reaches ops only through the table it is handed (`batch.ops`), so a test or a trainer can force one. An implementation asked
for by name that cannot load raises; only "auto" falls back, and logs what it chose and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

from miniinfer.kernels import onednn, reference
from miniinfer.utils import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Ops:
    """The operations, each documented at its definition in reference.py."""

    name: str
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope_qkv: Callable[..., Any]
    rope_qkv_cache: Callable[..., Any]
    attention: Callable[..., Any]
    paged_attention: Callable[..., Any]
    silu_mul: Callable[..., Any]
    moe: Callable[..., Any]
    sample_rows: Callable[..., Any]
    apply_penalties: Callable[..., Any]
    apply_bitmask: Callable[..., Any]
    stage: Callable[..., Any]
    step_inputs: Callable[..., Any]
    deliver: Callable[..., Any]
    copy_pages: Callable[..., Any]
    rope_paged_attention: Callable[..., Any] | None  # rope_qkv_cache, then paged_attention with its result for q; None = the two
    moe_into_norm: Callable[..., Any] | None  # (moe's arguments, residual, norm, eps) -> as add_rms_norm of its result; None = the two
    pack_linear: Callable[..., Any] | None  # (weight [N, K], bias) -> (x -> y), called once per linear layer at load; None = F.linear
    pack_gated: Callable[..., Any] | None  # (weight [2 I, K], bias) -> (x -> silu_mul of the product), likewise; None = linear, then silu_mul
    pack_into_norm: Callable[..., Any] | None  # (weight, bias, norm, eps, weight of a product behind) -> ((x, residual) -> (normed, sum))
    pack_chain: Callable[..., Any] | None  # products from one attention to the next in one: see kernels/triton/linear.py; None = one by one

    @staticmethod
    def overlay(name: str, *modules: ModuleType) -> Ops:
        """The reference ops, replaced by those of the same name that a module defines; later modules win."""
        table: dict[str, Any] = {}
        for f in fields(Ops):
            if f.name != "name":
                table[f.name] = next((getattr(m, f.name) for m in reversed(modules) if hasattr(m, f.name)), getattr(reference, f.name, None))
        return Ops(name=name, **table)


REFERENCE = Ops.overlay("reference")


def select(kernels: str, device: str, deterministic: bool = False) -> Ops:
    """The op table for `EngineConfig.kernels` on a device ("cuda" or "cpu"). Raises RuntimeError if a named one cannot load.

    `deterministic`: with operations whose result for a token never depends on what else is in the step; RuntimeError where there are none."""
    if kernels == "reference" and not deterministic:
        return REFERENCE
    wanted = kernels if kernels != "auto" else ("triton" if device == "cuda" else "cpu")
    try:
        if wanted == "triton":
            from miniinfer.kernels import triton as module
        else:
            from miniinfer.kernels import cpu as module  # type: ignore[no-redef]
        module.load()
        table = Ops.overlay(wanted, module)
        return replace(table, **module.fixed_order()) if deterministic else table
    except Exception as e:  # a missing compiler or package: anything may be the reason
        if kernels != "auto" or deterministic:
            raise RuntimeError(f"kernels: {kernels} cannot be used here: {e}") from e
        log.warning("%s kernels cannot be used here (%s): plain torch instead, slower", wanted, e)
        return Ops.overlay("torch", onednn) if device == "cpu" else REFERENCE
