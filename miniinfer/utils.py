"""Small helpers with no better home: logging, and an early start for a GPU. Imports neither torch nor anything of ours."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading

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


def wake_gpu() -> None:
    """Starts to make the CUDA context, which takes a quarter of a second, beside the import of torch, which will use it. Without a GPU, nothing.
    For processes that are ours alone: what hides GPUs from a process (CUDA_VISIBLE_DEVICES) has no effect afterwards."""

    def make() -> None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return
        context = ctypes.c_void_p()
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)  # an error will come again when torch does it

    threading.Thread(target=make, name="wake-gpu", daemon=True).start()
