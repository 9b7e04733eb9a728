"""Small helpers with no better home: logging. Imports neither torch nor anything of ours."""

from __future__ import annotations

import logging
import sys

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
