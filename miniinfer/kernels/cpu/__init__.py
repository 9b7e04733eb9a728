"""CPU overlays of the reference ops."""


def load() -> None:
    """Raises RuntimeError where they cannot run."""
