"""The linear maps inside a model, whatever module holds them: y = x M + b.

linear       torch's Linear, weight [d_out, d_in]     M = weight^T
conv1d       GPT-2's Conv1D, weight [d_in, d_out]     M = weight
embedding    Embedding, weight [n_vocab, d]           M = weight, x one-hot, given as token ids
identity     what stands before a Linear or Conv1D    M = 1, y = x: its components say how the stream that the module reads is used

An identity is named by the module that it stands before, `<path>.pre_identity`; it is nowhere in the model itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.checks import require
from nndecomp.targets.hooks import Side, Tap


class MapKind(Enum):
    linear = "linear"
    conv1d = "conv1d"
    embedding = "embedding"
    identity = "identity"


BEFORE = ".pre_identity"


@dataclass(frozen=True)
class LinearMap:
    name: str  # path of the module in the model, and of an identity BEFORE
    module: nn.Module  # of an identity the one that it stands before
    kind: MapKind
    d_in: int
    d_out: int

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter), f"{self.name}.weight is a {type(weight).__name__}"
        return weight

    @property
    def tap(self) -> Tap:
        """Where y can be replaced."""
        return Tap(self.module, Side.input if self.kind is MapKind.identity else Side.output)

    @property
    def part(self) -> str:
        """The last part of its name, `c_fc` or `c_fc.pre_identity`."""
        path = self.name.removesuffix(BEFORE)
        return path.rpartition(".")[2] + self.name[len(path) :]

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """M, in float32."""
        weight = self.weight.detach().float()
        if self.kind is MapKind.identity:
            return torch.eye(self.d_in, device=weight.device)
        return weight.T if self.kind is MapKind.linear else weight

    def bias(self) -> Float[Tensor, " d_out"] | None:
        bias = None if self.kind is MapKind.identity else getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


def kind_of(module: nn.Module) -> MapKind | None:
    """None for what is no linear map, and for what computes more than its kind does (Gemma scales its embedding)."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return MapKind.linear
    if forward is nn.Embedding.forward:
        return MapKind.embedding
    # By name: transformers is slow to import, and a model made of its modules has imported it.
    if forward.__qualname__ == "Conv1D.forward" and forward.__module__.startswith("transformers."):
        return MapKind.conv1d
    return None


def linear_map(name: str, module: nn.Module) -> LinearMap:
    kind = kind_of(module)
    assert kind is not None, f"{name} is a {type(module).__name__}, not a linear map"
    shape = tuple(module.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType, reportAttributeAccessIssue]
    d_in, d_out = reversed(shape) if kind is MapKind.linear else shape
    return LinearMap(name, module, kind, d_in, d_out)


def identity_before(linear: LinearMap) -> LinearMap:
    """What stands before a map of vectors."""
    require(
        linear.kind in (MapKind.linear, MapKind.conv1d),
        f"spd.maps: {linear.name}{BEFORE} would be an identity of tokens; name a Linear or Conv1D before{BEFORE}",
    )
    return LinearMap(f"{linear.name}{BEFORE}", linear.module, MapKind.identity, linear.d_in, linear.d_in)


def map_named(model: nn.Module, name: str) -> LinearMap | None:
    """The map of this name, if the model has it."""
    path = name.removesuffix(BEFORE)
    module = dict(model.named_modules()).get(path)
    if module is None or kind_of(module) is None:
        return None
    linear = linear_map(path, module)
    return linear if path == name else identity_before(linear)


def find_maps(model: nn.Module, patterns: Mapping[str, int]) -> dict[LinearMap, int]:
    """Every map that a pattern of module paths matches, with the pattern's number; in the order of the patterns. A pattern
    that ends in BEFORE is of the identities before the maps that the rest of it matches.

    Raises SettingError for a pattern that matches nothing, what is no linear map, or a map that is matched before.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[LinearMap, int] = {}
    by_name: dict[str, str] = {}
    for pattern, n in patterns.items():
        paths = pattern.removesuffix(BEFORE)
        names = [name for name in modules if fnmatchcase(name, paths)]
        known = [name for name, module in modules.items() if kind_of(module) is not None]
        require(bool(names), f"spd.maps: {pattern} matches none of the target's linear maps: {_listed(known)}")
        for name in names:
            module = modules[name]
            require(
                kind_of(module) is not None,
                f"spd.maps: {pattern} matches {name}, a {type(module).__name__}, which is no linear map (Linear, Conv1D or "
                "Embedding)",
            )
            own = linear_map(name, module)
            own = own if paths == pattern else identity_before(own)
            require(
                own.name not in by_name, f"spd.maps: {own.name} is matched by {by_name.get(own.name)} and by {pattern}"
            )
            by_name[own.name] = pattern
            found[own] = n
    return found


def _listed(names: list[str]) -> str:
    """With numbers of layers starred, so that a model of 40 layers takes a line."""
    starred = (".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join(dict.fromkeys(starred))
