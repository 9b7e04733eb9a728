"""How a module says where its parameters lie in a checkpoint. The loader, the exporter and every later walk over weights read it.

Owns Part, Layout, Place and Layer, the base of all modules with parameters. Reads and writes no file (models/weights.py does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Take = Callable[[tuple[int, ...], torch.dtype], Tensor]  # (shape, dtype) -> memory for a parameter


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor inside a parameter: `size` rows from row `offset`, of expert `expert` if the parameter stacks experts."""

    name: str
    offset: int
    size: int
    expert: int | None = None

    def view(self, param: Tensor) -> Tensor:
        """The region of the parameter that this tensor fills; shares memory."""
        return (param if self.expert is None else param[self.expert]).narrow(0, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """A parameter in terms of the checkpoint tensors that make it up.

    `parts` are what we write and cover the parameter exactly; `alternatives` are other sets of parts that a checkpoint may hold instead.
    `shard_axis` is the axis of each part that tensor parallelism splits (None: every rank holds all of it); `ones` marks a norm's weight."""

    parts: tuple[Part, ...]
    shard_axis: int | None = None
    ones: bool = False
    alternatives: tuple[tuple[Part, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Precision and device that parameters are made on; `take` makes their memory, if it is not torch's to make."""

    dtype: torch.dtype
    device: torch.device
    take: Take | None = None

    def on_meta(self) -> Place:
        """The same without storage, for a parameter that another one stands in for."""
        return Place(self.dtype, torch.device("meta"))


class Layer(nn.Module):
    """A module that declares the layout of each of its own parameters. Layouts hang on the module, not on the tensors, so that a deep copy,
    a cast or a sharded stand-in keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[str, Layout] = {}

    def declare(self, name: str, shape: tuple[int, ...], layout: Layout, place: Place) -> nn.Parameter:
        """Registers an uninitialised parameter."""
        values = torch.empty(shape, dtype=place.dtype, device=place.device) if place.take is None else place.take(shape, place.dtype)
        param = nn.Parameter(values)
        self.register_parameter(name, param)
        self.layouts[name] = layout
        return param


def layouts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Layout]]:
    """(name, parameter, layout) of every parameter, in the order of and with the names of `named_parameters`: a shared one comes once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) not in seen:
                seen.add(id(param))
                assert isinstance(module, Layer), f"{prefix}: a module with parameters must be a Layer"
                yield f"{prefix}.{name}" if prefix else name, param, module.layouts[name]
