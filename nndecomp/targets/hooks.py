"""Reading and replacing activations of torch modules: the one file that touches torch hooks.

Hooks run in the order in which they are attached, so what is attached later sees what earlier ones have put there:
recording within a patch records replacements, and a patch within a patch replaces them again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nndecomp.targets.base import Replace
from nndecomp.types import Site


class Side(Enum):
    input = "input"  # the module's first argument: replacing it changes what this module reads, and nothing else
    output = "output"  # what the module returns, or the first entry of the tuple that it returns
    # The module's first argument, overwritten where it lies. A block keeps its residual stream in a variable, hands it
    # to a norm and adds the same tensor again after the MLP: only writing into the tensor itself reaches both, and
    # putting back what was there changes no bit (removing the attention's output and adding another would).
    stream = "stream"


@dataclass(frozen=True)
class Tap:
    """Where an activation [batch, pos, width] can be read and replaced."""

    module: nn.Module
    side: Side
    columns: slice | None = None  # of the last axis: one head among those side by side; None for all


class _EverythingRecorded(Exception):
    """Ends a forward pass that has nothing left to record."""


def _swap(tap: Tap, replace: Replace, value: Tensor) -> Tensor | None:
    """What to put in place of `value`, or None to leave it."""
    old = value if tap.columns is None else value[..., tap.columns]
    new = replace(old.clone() if tap.side is Side.stream else old)
    if new is None:
        return None
    assert new.shape == old.shape, f"a replacement of shape {tuple(new.shape)} stands where {tuple(old.shape)} belongs"
    new = new.to(old.dtype)
    if tap.side is Side.stream:
        old.copy_(new)
        return None
    if tap.columns is None:
        return new
    value = value.clone()
    value[..., tap.columns] = new
    return value


def _attach(tap: Tap, replace: Replace) -> RemovableHandle:
    swap = partial(_swap, tap, replace)

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = swap(args[0])
        return None if new is None else (new, *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            new = swap(output[0])
            return None if new is None else (new, *output[1:])
        return swap(output)

    match tap.side:
        case Side.output:
            return tap.module.register_forward_hook(after)
        case Side.input | Side.stream:
            return tap.module.register_forward_pre_hook(before)


@contextmanager
def visiting(visits: Sequence[tuple[Tap, Replace]]) -> Iterator[None]:
    """Within the block, every forward pass puts what arrives at each tap through its function.

    What it returns is cast to the model's precision. Two functions at one tap run in the given order.
    """
    with ExitStack() as attached:
        for tap, replace in visits:
            attached.callback(_attach(tap, replace).remove)
        yield


def _first(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return value


@contextmanager
def standing_still(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block these modules hand on their first argument and compute nothing."""
    for module in modules:
        assert "forward" not in vars(module), f"a {type(module).__name__} stands still already"
        vars(module)["forward"] = _first  # past __setattr__, by which a bridge hands on what is set
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


# Given x and y = map(x), what is to be there in place of y; None leaves it. At a module's output y is what it returns; at its
# input both are what it takes in.
Substitute = Callable[[Tensor, Tensor], Tensor | None]


@contextmanager
def substituting(substitutes: Mapping[Tap, Substitute]) -> Iterator[None]:
    """Within the block, what the function makes of x and y stands at each tap, cast to the dtype of y."""
    with ExitStack() as attached:
        for tap, substitute in substitutes.items():
            attached.callback(_attach_substitute(tap, substitute).remove)
        yield


def _attach_substitute(tap: Tap, substitute: Substitute) -> RemovableHandle:
    assert tap.columns is None, "a map is substituted as a whole"

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = _substituted(substitute, module, args, args[0])
        return None if new is None else (new, *args[1:])

    match tap.side:
        case Side.input:
            return tap.module.register_forward_pre_hook(before)
        case Side.output:
            return tap.module.register_forward_hook(partial(_substituted, substitute), prepend=True)
        case Side.stream:
            raise AssertionError("a stream is no map")


def _substituted(substitute: Substitute, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    assert isinstance(output, Tensor), f"a {type(module).__name__} returned a {type(output).__name__}"
    new = substitute(args[0], output)
    assert new is None or new.shape == output.shape, (
        f"a substitute of shape {tuple(new.shape)} stands where {tuple(output.shape)} belongs"
    )
    return None if new is None else new.to(output.dtype)


def record(run: Callable[[], object], taps: Mapping[Site, Tap]) -> dict[Site, Tensor]:
    """The activations at `taps` in a forward pass, `run`, which is ended as soon as the last one is there.

    Under no_grad and not inference_mode: a decomposition trains on these rows, and inference tensors refuse that.
    """
    recorded: dict[Site, Tensor] = {}

    def keep(site: Site, value: Tensor) -> None:
        recorded[site] = value
        if len(recorded) == len(taps):
            raise _EverythingRecorded

    visits = [(tap, partial(keep, site)) for site, tap in taps.items()]
    with torch.no_grad(), visiting(visits), suppress(_EverythingRecorded):
        run()
    assert len(recorded) == len(taps), f"the forward pass never came to {set(taps) - set(recorded)}"
    return recorded
