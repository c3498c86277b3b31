"""What the rest of the package needs from a model under study."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.errors import SettingError
from nndecomp.types import Point, Site

# Given the activation [batch, pos, width] that arrives at a site, what to put there, which is cast to the model's
# precision; None leaves it as it is.
Replace = Callable[[Tensor], Tensor | None]


class Shape(ABC):
    """Sizes of what is under study: of one model (`TargetShape`), or of two side by side (`targets.pair.PairedShape`)."""

    n_ctx: int  # tokens it takes in

    @property
    @abstractmethod
    def models(self) -> tuple[str | None, ...]:
        """The names by which sites say which model they are in; (None,) where there is one."""

    @abstractmethod
    def of(self, model: str | None) -> "TargetShape":
        """The shape of one of the models; SettingError for a name that is none of theirs."""

    def width(self, site: Site) -> int:
        """Coordinates of the activation at `site`."""
        return self.of(site.model).width(site)

    def check(self, site: Site, setting: str) -> None:
        """Refuse a site that is not there, naming the setting that asked for it."""
        self.of(site.model).check(site, setting)


@dataclass(frozen=True)
class TargetShape(Shape):
    """Sizes known from a model's configuration alone, before any weight is loaded."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    d_head: int
    n_vocab: int
    n_ctx: int
    points: frozenset[Point]  # points this family has: parallel blocks have no resid_mid
    gated: bool  # a neuron is the product of two linear maps, one of them through the activation function
    # Of each layer: radians a position by which pairs (i, i + n/2) of a query's and key's first n coordinates turn, one a
    # pair; () where the model tells positions apart in another way.
    rotary: tuple[tuple[float, ...], ...] = ()

    @property
    def d_read_neuron(self) -> int:
        """Weights with which one neuron reads mlp_in."""
        return 2 * self.d_model if self.gated else self.d_model

    def width(self, site: Site) -> int:
        match site.point:
            case Point.mlp_hidden:
                return self.d_mlp
            case Point.z:
                return self.d_head if site.head is not None else self.n_heads * self.d_head
            case _:
                return self.d_model

    def of(self, model: str | None) -> "TargetShape":
        if model is not None:
            raise SettingError(f"a site begins with {model}: but there is one target; write paired_target for a second")
        return self

    @property
    def models(self) -> tuple[str | None, ...]:
        return (None,)

    def check(self, site: Site, setting: str) -> None:
        self.of(site.model)
        if site.layer >= self.n_layers:
            raise SettingError(f"{setting} asks for site {site}, but the target has layers 0 to {self.n_layers - 1}")
        if site.point not in self.points:
            raise SettingError(
                f"{setting} asks for site {site}, but the target has no {site.point.value}; "
                f"it has {', '.join(p.value for p in Point if p in self.points)}"
            )
        if site.head is not None and site.head >= self.n_heads:
            raise SettingError(f"{setting} asks for site {site}, but the target has heads 0 to {self.n_heads - 1}")


@dataclass(frozen=True)
class Neurons:
    """An MLP as vectors: neuron i computes act(read_i . x + bias_i) and adds write_i; of gated ones `read` is the gate's."""

    read: Float[Tensor, "neuron d"]
    bias: Float[Tensor, "neuron"]
    write: Float[Tensor, "neuron d"]  # put through the post-norm on its own, where there is one


@dataclass(frozen=True)
class Heads:
    """Attention as matrices: from t, head h gives position u the score scale * R_t(x_t W_Q + b_Q) . R_u(x_u W_K + b_K),
    with R the turning by position (`TargetShape.rotary`), and moves x_u W_V W_O."""

    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    b_K: Float[Tensor, "head d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    scale: float


class Target(ABC):
    """A language model in eval mode, its parameters frozen. Padding, if any, stands right of the text.

    Two models side by side are a target too (`targets.pair.PairedTarget`): sites say which of them they are in, and
    `predicting` says whose logits are asked for.
    """

    name: str  # as a reader would recognise it in a table
    shape: Shape
    tokenizer: Any  # a transformers PreTrainedTokenizerBase
    device: torch.device
    begins_late = False  # whether `begun` is there

    def predicting(self, model: str | None) -> "Target":
        """The same target with `logits` of the model named: of one model, itself."""
        assert model is None, f"there is one target, and none called {model}"
        return self

    def twin(self) -> "Target":
        """The same weights, in memory once, behind hooks of its own: both can run at the same time."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                weights = {id(tensor): tensor for tensor in (*value.parameters(), *value.buffers())}
                setattr(other, name, copy.deepcopy(value, weights))
        return other

    @abstractmethod
    def record(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch pos width"]]:
        """The activations at `sites`, from one forward pass that stops after the last of them.

        No LM head is computed. No gradient is kept. Replacements of an enclosing `patch` apply.
        """

    @abstractmethod
    def patch(self, replacements: Mapping[Site, Replace]) -> AbstractContextManager[None]:
        """Within the block, every forward pass puts each site's activation through its replacement.

        Sites are visited in the order in which the model computes them. The hooks are gone afterwards, also
        after an exception.
        """

    def begun(self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]) -> AbstractContextManager[None]:
        """Within the block forward passes compute nothing of the layers before `layer`, whose residual stream is `resid_pre`."""
        raise AssertionError(f"a {type(self).__name__} computes all of its layers")

    @abstractmethod
    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits. Gradients flow if the caller enabled them."""

    def final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What the LM head reads: `logits` is `head` of it. SettingError where a target cannot say."""
        raise SettingError(
            f"what the LM head reads is needed, and {self.name} does not show it; write target.kind=huggingface"
        )

    def head(self, final: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Logits from what the LM head reads, a few rows at a time where all would not fit."""
        raise SettingError(f"the LM head is needed, and {self.name} does not show it; write target.kind=huggingface")

    def place_of_map(self, name: str) -> tuple[Site | None, Site]:
        """Of the part of the model that a linear map, named by the path of its module, belongs to: the site that the part
        reads (null: tokens) and the one it writes. SettingError for a map that is no part of an MLP, attention or embedding."""
        raise SettingError(f"spd.maps names linear maps of a model, and {self.name} shows none")

    def module(self) -> nn.Module:
        """The model whose linear maps can be decomposed. SettingError where there is none."""
        raise SettingError(f"spd.maps names linear maps of a model, and {self.name} shows none")

    @abstractmethod
    def mlp_out_of(self, layer: int, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows d"]:
        """mlp_out from mlp_hidden by the model's own modules (last linear map, bias, post-norm if any)."""

    def mlp_of(self, site: Site, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """mlp_out from mlp_in, the MLP alone; `site` is the mlp_in. Gradients flow if the caller enabled them; what an
        enclosing `patch` puts inside the MLP (mlp_hidden) applies. SettingError where a target cannot say."""
        raise SettingError(f"decomposition.directions=mlp_response needs an MLP at {site}, and {self.name} shows none")

    def neurons_of(self, site: Site) -> Neurons:
        """The neurons that read `site`, an mlp_in. SettingError where a target cannot say."""
        raise SettingError(f"decomposition.directions=neurons needs an MLP at {site}, and {self.name} shows none")

    def neuron_writes(self, layer: int) -> Float[Tensor, "neuron d"]:
        """What each neuron of a layer writes when it is worth 1, before a post-norm if there is one. SettingError where a
        target cannot say."""
        raise SettingError(
            f"decomposition.ranking=output_norm needs an MLP in layer {layer}, and {self.name} shows none"
        )

    def heads_of(self, site: Site) -> Heads:
        """The heads that read `site`, an attn_in. SettingError where scores are another function of x, or unknown."""
        raise SettingError(
            f"decomposition.attention_start=target needs the attention weights at {site}, and {self.name} shows none; "
            "write attention_start=random"
        )
