"""The public names, loaded when first used: importing the package itself imports neither torch nor anything else of ours."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniinfer.data import CompletionOutput, RequestOutput, SamplingParams, StructuredOutputsParams
    from miniinfer.engine.beam import BeamSearchParams
    from miniinfer.engine.client import AsyncEngine
    from miniinfer.engine.llm import LLM

__version__ = "0.1.0"

# The CPU kernels' threads meet after every operation, and by default spin there for milliseconds. Where a core is shared with another process
# (the API, a client) that makes a step fifty times slower. OpenMP's runtime reads this when torch loads it; a user's own setting stands.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["LLM", "AsyncEngine", "BeamSearchParams", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "miniinfer.engine.llm",
    "AsyncEngine": "miniinfer.engine.client",
    "BeamSearchParams": "miniinfer.engine.beam",
    "SamplingParams": "miniinfer.data",
    "StructuredOutputsParams": "miniinfer.data",
    "RequestOutput": "miniinfer.data",
    "CompletionOutput": "miniinfer.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'miniinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
