"""Small helpers with no better home: logging, and a process's start. Imports neither torch nor anything of ours."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """A logger below "miniinfer", named after the module without the package."""
    return logging.getLogger("miniinfer." + name.removeprefix("miniinfer."))


def setup_logging(level: str = "info") -> None:
    """Send our log to stderr, once a process. Called by entry points only: a library must not configure its user's logging."""
    root = logging.getLogger("miniinfer")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel(level.upper())


@contextmanager
def starting(device: str) -> Iterator[None]:
    """For the start of a process that is ours alone, importing torch included: a CUDA context is made beside that import, a quarter of a second,
    unless `device` is "cpu"; and the garbage collector waits, which else takes 7 % of it, and will never look at what start-up made."""
    if device != "cpu":
        threading.Thread(target=_make_context, name="cuda-context", daemon=True).start()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _make_context() -> None:
    """The context that torch will find and use. What cannot be done is left to torch, which says why."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
