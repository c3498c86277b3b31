"""A model and decompositions small enough to know what an evaluation of them must say."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nndecomp.decompositions.base import Decomposition, GroupCost
from nndecomp.targets.base import Replace, Target, TargetShape
from nndecomp.tokens.batch import Row, TokenBatch
from nndecomp.types import Layout, Point, Site

D, VOCAB = 8, 17


class ToyTarget(Target):
    """A causal mean over positions and an MLP a layer, with weights large enough that errors compound."""

    def __init__(self, n_layers: int) -> None:
        draw = torch.Generator().manual_seed(0)
        points = frozenset({Point.mlp_in, Point.mlp_out, Point.resid_post})
        self.name, self.tokenizer, self.device = "toy", None, torch.device("cpu")
        self.shape = TargetShape(n_layers, D, D, 1, D, VOCAB, 64, points, gated=False)
        self.embed = torch.randn(VOCAB, D, generator=draw)
        self.weights = torch.randn(n_layers, D, D, generator=draw) / D**0.5
        self.hooks: dict[Site, Replace] = {}
        self.watch: Callable[[Site, Tensor], None] | None = None

    def mlp(self, layer: int) -> Callable[[Tensor], Tensor]:
        return lambda x: 2 * torch.sin(2 * x @ self.weights[layer])

    def _visit(self, site: Site, value: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(site, value)
        replaced = self.hooks[site](value) if site in self.hooks else None
        return value if replaced is None else replaced

    def logits(self, tokens: Tensor) -> Tensor:
        resid = self.embed[tokens]
        for layer in range(self.shape.n_layers):
            count = torch.arange(1, tokens.shape[1] + 1)[:, None]
            resid = resid + resid.cumsum(1) / count
            x = self._visit(Site(layer, Point.mlp_in), resid / resid.square().mean(-1, keepdim=True).sqrt())
            resid = resid + self._visit(Site(layer, Point.mlp_out), self.mlp(layer)(x))
            resid = self._visit(Site(layer, Point.resid_post), resid)
        return resid / resid.square().mean(-1, keepdim=True).sqrt() @ self.embed.T

    def record(self, tokens: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        with self.patch({site: lambda v, site=site: found.update({site: v}) for site in sites}):
            self.logits(tokens)
        return found

    @contextmanager
    def patch(self, replacements: Mapping[Site, Replace]) -> Iterator[None]:
        self.hooks = dict(replacements)
        try:
            yield
        finally:
            self.hooks = {}

    def mlp_out_of(self, layer: int, hidden: Tensor) -> Tensor:
        raise AssertionError("the toy has no mlp_hidden")


@dataclass(frozen=True)
class FirstComponents:
    """Components 0..l of group l active on every token."""

    groups: tuple[int, ...]
    n_tokens: int

    def counts(self) -> Tensor:
        return torch.tensor(self.groups).add(1).expand(self.n_tokens, -1)

    def firings(self) -> tuple[Tensor, ...]:
        return tuple((torch.arange(4) <= group).long() * self.n_tokens for group in self.groups)


class EachSite(Decomposition):
    """Site i of `writes` as a function of site i of `reads`."""

    def __init__(
        self, reads: Sequence[Site], writes: Sequence[Site], maps: Sequence[Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__()
        self.reads, self.writes, self.maps = tuple(reads), tuple(writes), tuple(maps)
        self.read_layout = Layout.of(dict.fromkeys(reads, D))
        self.write_layout = Layout.of(dict.fromkeys(writes, D))
        self.costs = tuple(GroupCost(f"L{site.layer}", 4, 2 * D, 1, 4 * D, 0) for site in writes)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, FirstComponents]:
        parts = zip(x.split(D, dim=1), self.maps, strict=True)
        groups = tuple(site.layer for site in self.writes)
        return torch.cat([f(part) for part, f in parts], dim=1), FirstComponents(groups, len(x))

    def live_obstacle(self) -> str | None:
        return None

    def live_run(self) -> "EachRun":
        return EachRun(self)


class EachRun:
    def __init__(self, of: EachSite) -> None:
        self.of, self.seen = of, {}

    def read(self, site: Site, value: Tensor) -> None:
        self.seen[site] = value

    def write(self, site: Site) -> Tensor:
        i = self.of.writes.index(site)
        return self.of.maps[i](self.seen[self.of.reads[i]])

    def active(self) -> FirstComponents:
        assert set(self.seen) == set(self.of.reads)
        return FirstComponents(tuple(site.layer for site in self.of.writes), len(next(iter(self.seen.values()))))


def linear(layer: int) -> Callable[[Tensor], Tensor]:
    """A poor approximation of any MLP."""
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(100 + layer)) / D**0.5
    return lambda x: x @ weight


def text() -> tuple[TokenBatch, Tensor]:
    """Six sequences, two of them padded, each with a BOS that is not kept."""
    draw = torch.Generator().manual_seed(1)
    rows = [Row(torch.randint(VOCAB, (n,), generator=draw).tolist(), True) for n in (12, 12, 5, 12, 9, 12)]
    batch = TokenBatch.of(rows, 12, pad=0)
    return batch, batch.mask & ~batch.is_bos
