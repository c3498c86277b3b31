"""A target made of torch modules whose family says which module is which site."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.errors import SettingError
from nndecomp.targets.base import Neurons, Replace, Target, TargetShape
from nndecomp.targets.hooks import Side, Tap, record, standing_still, visiting
from nndecomp.types import Point, Site


@dataclass(frozen=True)
class Wiring:
    """Where a family of models has its sites, as paths of modules."""

    embed: str  # the module that returns `embed`
    blocks: str  # the list of blocks
    points: Mapping[Point, tuple[str, Side]]  # path within a block, "" for the block itself
    mlp_tail: tuple[str, ...]  # the modules, within a block, that make mlp_out from mlp_hidden
    neurons: str  # the linear map whose activation function says whether a neuron is active: in gated MLPs, the gate

    @staticmethod
    def of_blocks(
        *,
        embed: str,
        blocks: str,
        first_norm: str,
        attn_tail: tuple[str, ...],
        second_norm: str,
        mlp_tail: tuple[str, ...],
        neurons: str,
    ) -> "Wiring":
        """Blocks of attention, which alone reads the first norm, and then `mlp`; the tails are the modules from z to attn_out, from neurons to mlp_out."""
        return Wiring(
            embed,
            blocks,
            {
                Point.resid_pre: ("", Side.input),
                Point.attn_in: (first_norm, Side.output),
                Point.z: (attn_tail[0], Side.input),
                Point.attn_out: (attn_tail[-1], Side.output),
                Point.resid_mid: (second_norm, Side.stream),
                Point.mlp_in: ("mlp", Side.input),
                Point.mlp_hidden: (mlp_tail[0], Side.input),
                Point.mlp_out: (mlp_tail[-1], Side.output),
                Point.resid_post: ("", Side.output),
            },
            mlp_tail,
            neurons,
        )

    def without(self, absent: Point) -> "Wiring":
        return replace(self, points={point: place for point, place in self.points.items() if point is not absent})

    @property
    def available(self) -> frozenset[Point]:
        return frozenset({Point.embed, *self.points})


class ModuleTarget(Target):
    begins_late = True

    def __init__(self, name: str, model: nn.Module, shape: TargetShape, tokenizer: Any, wiring: Wiring) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.shape = shape
        self.tokenizer = tokenizer
        self.wiring = wiring
        self.device = next(model.parameters()).device

    @abstractmethod
    def _residual(self, tokens: Int[Tensor, "batch pos"]) -> object:
        """Run the model as far as the last block, without the LM head."""

    @abstractmethod
    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]: ...

    def record(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch pos width"]]:
        assert sites, "no sites to record"
        tokens = self._checked(tokens)
        recorded = record(lambda: self._residual(tokens), {site: self._tap(site) for site in sites})
        return {site: recorded[site] for site in sites}

    def place_of_map(self, name: str) -> tuple[Site | None, Site]:
        wiring = self.wiring
        if name == wiring.embed:
            return None, Site(0, Point.embed)
        layer, _, path = name.removeprefix(f"{wiring.blocks}.").partition(".")
        part = path.partition(".")[0]
        inside = name.startswith(f"{wiring.blocks}.")
        for tail, read, write in (
            (wiring.mlp_tail[0], Point.mlp_in, Point.mlp_out),
            (wiring.points[Point.z][0] if Point.z in wiring.points else "", Point.attn_in, Point.attn_out),
        ):
            if inside and part and part == tail.partition(".")[0]:
                return Site(int(layer), read), Site(int(layer), write)
        raise SettingError(
            f"spd.maps: {name} is no part of an MLP, of attention or of the token embedding of {self.name}"
        )

    def module(self) -> nn.Module:
        return self.model

    @contextmanager
    def patch(self, replacements: Mapping[Site, Replace]) -> Iterator[None]:
        with visiting([(self._tap(site), replacements[site]) for site in sorted(replacements)]):
            yield

    @contextmanager
    def begun(self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
        blocks = list(self._module(self.wiring.blocks).children())[:layer]
        with standing_still(blocks), self.patch({Site(layer, Point.resid_pre): lambda _: resid_pre}):
            yield

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self._logits(self._checked(tokens))

    def mlp_out_of(self, layer: int, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows d"]:
        assert 0 <= layer < self.shape.of(None).n_layers, f"layer {layer} of {self.shape.of(None).n_layers}"
        value = hidden.to(next(self.model.parameters()).dtype)
        for path in self.wiring.mlp_tail:
            # `forward`, not a call: called from within `patch`, it must not meet the hooks again.
            value = self._module(f"{self.wiring.blocks}.{layer}.{path}").forward(value)
        return value

    def mlp_of(self, site: Site, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        value = self._through(site, "mlp", rows)
        for path in self.wiring.mlp_tail[1:]:  # a post-norm
            value = self._through(site, path, value)
        return value

    @torch.no_grad()
    def neurons_of(self, site: Site) -> Neurons:
        """Linear maps are asked what they do to unit vectors, so that it does not matter how they store their weights."""
        assert site.point is Point.mlp_in, f"neurons read mlp_in, not {site}"
        shape = self.shape.of(None)
        nothing = torch.zeros(1, shape.d_model, device=self.device)
        bias = self._through(site, self.wiring.neurons, nothing)
        read = self._through(site, self.wiring.neurons, torch.eye(shape.d_model, device=self.device)) - bias
        write = self.neuron_writes(site.layer)
        for path in self.wiring.mlp_tail[1:]:
            write = self._through(site, path, write)
        return Neurons(read.T.float(), bias[0].float(), write.float())

    @torch.no_grad()
    def neuron_writes(self, layer: int) -> Float[Tensor, "neuron d"]:
        site, d_mlp = Site(layer, Point.mlp_hidden), self.shape.of(None).d_mlp
        silent, alone = torch.zeros(1, d_mlp, device=self.device), torch.eye(d_mlp, device=self.device)
        return self._through(site, self.wiring.mlp_tail[0], alone) - self._through(
            site, self.wiring.mlp_tail[0], silent
        )

    def _through(self, site: Site, path: str, rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_out"]:
        """A module of the site's block, as in `mlp_out_of`."""
        module = self._module(f"{self.wiring.blocks}.{site.layer}.{path}")
        return module.forward(rows.to(next(self.model.parameters()).dtype)[None])[0]

    def _checked(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        n_pos, n_ctx = tokens.shape[1], self.shape.n_ctx
        assert 0 < n_pos <= n_ctx, f"sequences of {n_pos} tokens, but {self.name} reads 1 to {n_ctx}"
        return tokens.to(self.device)

    def _module(self, path: str) -> nn.Module:
        return reduce(getattr, path.rstrip(".").split("."), self.model)

    def _tap(self, site: Site) -> Tap:
        self.shape.check(site, "sites")
        if site.point is Point.embed:
            return Tap(self._module(self.wiring.embed), Side.output)
        path, side = self.wiring.points[site.point]
        module = self._module(f"{self.wiring.blocks}.{site.layer}.{path}")
        d_head = self.shape.of(None).d_head
        columns = None if site.head is None else slice(site.head * d_head, (site.head + 1) * d_head)
        return Tap(module, side, columns)
