"""Small helpers with no better home: logging, and a process's start. Imports neither torch nor anything of ours."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

_FORM = "MINIINFER_LOG_FORMAT"  # by which the engine process learns it too
_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """A logger below "miniinfer", named after the module without the package."""
    return logging.getLogger("miniinfer." + name.removeprefix("miniinfer."))


class _JsonFormatter(logging.Formatter):
    """One JSON object a line: when, how bad, who says what, and the `fields` that a caller gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


def setup_logging(level: str = "info", form: str | None = None) -> None:
    """Send our log to stderr, once a process. Called by entry points only: a library must not configure its user's logging.

    `form`: "text" or "json"; None: as the process above us was told."""
    if form is not None:
        os.environ[_FORM] = form
    root = logging.getLogger("miniinfer")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        plain = os.environ.get(_FORM, "text") != "json"
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S") if plain else _JsonFormatter())
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
