"""Triton overlays of the reference ops (GPU)."""


def load() -> None:
    """Raises ImportError where Triton is missing."""
    import triton  # noqa: F401
