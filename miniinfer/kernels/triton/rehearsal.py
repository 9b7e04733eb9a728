"""Compiling kernels ahead of their first launch, many at once.

Triton compiles a kernel when it is first launched, and the launch waits: a model's first steps would compile some twenty kernels one after
the other. Within `rehearsal` a launch only has its kernel compiled, by a pool of threads, so that a dry run of those steps finds what they
need, in their own words and with nothing to keep up to date, and all cores compile it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

_ONE = threading.Lock()  # one thread at a time rehearses


@contextmanager
def rehearsal() -> Iterator[None]:
    """Launches of this thread compile and do not run: tensors that kernels would write stay as they are. At the end every kernel is compiled and
    loaded, but those that cannot be; their launches will raise."""
    if triton.knobs.runtime.interpret:
        yield
        return
    thread = threading.get_ident()
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1  # -1: none to set

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == thread, **options)

    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,))
    with _ONE, pool, _Mode(pool, ignore_errors=True):
        run, JITFunction.run = JITFunction.run, compile_only
        try:
            yield
        finally:
            JITFunction.run = run


class _Mode(triton.AsyncCompileMode):
    """Triton's own, but a kernel is loaded in its thread too, and known to later launches at once. Threads suffice: LLVM and ptxas, which take most
    of the time, need no GIL."""

    def submit(self, key: Any, compile: Callable[[], Any], keep: Callable[[Any], None]) -> Any:
        def compile_and_load() -> Any:
            kernel = compile()
            kernel.run  # noqa: B018  # a property: makes the launcher and loads the binary
            keep(kernel)
            return kernel

        return super().submit(key, compile_and_load, keep)
