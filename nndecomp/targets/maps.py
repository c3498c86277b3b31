"""The linear maps inside a model, whatever module holds them: y = x M + b.

linear       torch's Linear, weight [d_out, d_in]     M = weight^T
conv1d       GPT-2's Conv1D, weight [d_in, d_out]     M = weight
embedding    Embedding, weight [n_vocab, d]           M = weight, x one-hot, given as token ids
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.checks import require


class MapKind(Enum):
    linear = "linear"
    conv1d = "conv1d"
    embedding = "embedding"


@dataclass(frozen=True)
class LinearMap:
    name: str  # path of the module in the model
    module: nn.Module
    kind: MapKind
    d_in: int
    d_out: int

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter), f"{self.name}.weight is a {type(weight).__name__}"
        return weight

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """M, in float32."""
        weight = self.weight.detach().float()
        return weight.T if self.kind is MapKind.linear else weight

    def bias(self) -> Float[Tensor, " d_out"] | None:
        bias = getattr(self.module, "bias", None)
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


def find_maps(model: nn.Module, patterns: Mapping[str, int]) -> dict[LinearMap, int]:
    """Every map that a pattern of module paths matches, with the pattern's number; in the order of the patterns.

    Raises SettingError for a pattern that matches nothing, what is no linear map, or a map that is matched before.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[LinearMap, int] = {}
    by_name: dict[str, str] = {}
    for pattern, n in patterns.items():
        names = [name for name in modules if fnmatchcase(name, pattern)]
        known = [name for name, module in modules.items() if kind_of(module) is not None]
        require(bool(names), f"spd.maps: {pattern} matches none of the target's linear maps: {_listed(known)}")
        for name in names:
            module = modules[name]
            require(
                kind_of(module) is not None,
                f"spd.maps: {pattern} matches {name}, a {type(module).__name__}, which is no linear map (Linear, Conv1D or "
                "Embedding)",
            )
            require(name not in by_name, f"spd.maps: {name} is matched by {by_name.get(name)} and by {pattern}")
            by_name[name] = pattern
            found[linear_map(name, module)] = n
    return found


def _listed(names: list[str]) -> str:
    """With numbers of layers starred, so that a model of 40 layers takes a line."""
    starred = (".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return ", ".join(dict.fromkeys(starred))
