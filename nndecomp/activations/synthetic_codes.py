"""When synthetic features fire, and how strongly: frequencies, correlations, hierarchy, magnitudes.

    root i fires        where u_i < p_i, with u_i = Phi(sqrt(1 - s) e_i + sqrt(s) <a_i, h>), e and h standard normal
    child c of i fires  with probability child_share where i does, alone among its siblings if they exclude each other

<a_i, h> with |a_i| = 1 is the part that correlated features share (a Gaussian copula: frequencies stay p_i). Feature
numbers: roots of trees, their children, the children's children, ...; then features that stand alone.
"""

import hashlib
import math
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.config.schema import Correlation, Frequencies, Magnitudes, SyntheticConfig, require


def generator(*label: object) -> torch.Generator:
    """Random numbers that depend on the label alone."""
    digest = hashlib.blake2b(repr(label).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


class Firing:
    """Draws codes. Raises SettingError if `l0` asks a feature to fire on more than every token."""

    def __init__(self, cfg: SyntheticConfig) -> None:
        self.cfg = cfg
        n = cfg.n_features
        self.parents = torch.full((n,), -1)
        starts, size = [0], cfg.trees
        for _ in range(cfg.depth if cfg.trees else 0):
            start = starts[-1] + size
            self.parents[start : start + size * cfg.children] = (
                starts[-1] + torch.arange(size * cfg.children) // cfg.children
            )
            starts.append(start)
            size *= cfg.children
        self.level_starts = [*starts[1:], cfg.n_in_trees]  # of each level below the roots, and where the last one ends
        self.roots = (self.parents < 0).nonzero().squeeze(1)
        self.frequencies = self._frequencies()
        largest = self.frequencies.max().item()
        require(
            largest <= 1,
            f"activations.synthetic.l0={cfg.l0} would have a feature fire on {largest:.2f} of the tokens; write fewer, "
            "more features, or frequencies that differ less",
        )

    def _frequencies(self) -> Float[Tensor, "feature"]:
        """Share of tokens on which each feature fires; they add to l0."""
        cfg, n_roots = self.cfg, len(self.roots)
        rank = torch.arange(n_roots, dtype=torch.float64)
        match cfg.frequencies:
            case Frequencies.constant:
                weight = torch.ones_like(rank)
            case Frequencies.linear:
                weight = n_roots - rank
            case Frequencies.zipf:
                weight = (rank + 1) ** -cfg.zipf_exponent
            case Frequencies.random:
                weight = torch.rand(n_roots, generator=generator(cfg.seed, "frequencies"), dtype=torch.float64)
        every = torch.zeros(cfg.n_features, dtype=torch.float64)
        every[self.roots] = weight
        for start, stop in zip(self.level_starts, self.level_starts[1:], strict=False):
            every[start:stop] = cfg.child_share * every[self.parents[start:stop]]
        return every * (cfg.l0 / every.sum())

    @cached_property
    def loadings(self) -> Float[Tensor, "root factor"]:
        """a: what each root hangs on."""
        n_roots, rank = len(self.roots), self.cfg.correlation_rank
        match self.cfg.correlation:
            case Correlation.blocks:
                return torch.eye(rank)[torch.arange(n_roots) * rank // n_roots]
            case _:
                a = torch.randn(n_roots, rank, generator=generator(self.cfg.seed, "loadings"))
                return a / a.norm(dim=1, keepdim=True)

    def active(self, n_tokens: int, draw: torch.Generator) -> Bool[Tensor, "token feature"]:
        cfg = self.cfg
        u = torch.rand(n_tokens, cfg.n_features, generator=draw)
        if cfg.correlation is not Correlation.none:
            own = torch.randn(n_tokens, len(self.roots), generator=draw)
            common = torch.randn(n_tokens, cfg.correlation_rank, generator=draw) @ self.loadings.T
            s = cfg.correlation_strength
            u[:, self.roots] = torch.special.ndtr(math.sqrt(1 - s) * own + math.sqrt(s) * common)
        active = u < self.frequencies.float()
        for start, stop in zip(self.level_starts, self.level_starts[1:], strict=False):
            parents, place = self.parents[start:stop], torch.arange(stop - start) % cfg.children
            if cfg.siblings_exclusive:
                # One number for all siblings: each child has its own interval of it.
                chosen = (
                    (u[:, start : stop : cfg.children] / cfg.child_share).floor().repeat_interleave(cfg.children, 1)
                )
                fires = chosen == place
            else:
                fires = u[:, start:stop] < cfg.child_share
            active[:, start:stop] = active[:, parents] & fires
        return active

    def draw(self, n_tokens: int, draw: torch.Generator) -> Float[Tensor, "token feature"]:
        """Codes of fresh tokens."""
        active = self.active(n_tokens, draw)
        shape = active.shape
        match self.cfg.magnitudes:
            case Magnitudes.constant:
                return active.float()
            case Magnitudes.uniform:
                return active * (0.5 + torch.rand(shape, generator=draw))
            case Magnitudes.exponential:
                return active * -torch.log1p(-torch.rand(shape, generator=draw))
            case Magnitudes.folded_normal:
                return active * torch.randn(shape, generator=draw).abs() * math.sqrt(math.pi / 2)


def levels(parents: Int[Tensor, "feature"]) -> Int[Tensor, "feature"]:
    """0 for roots, 1 for their children, ..."""
    level = torch.zeros_like(parents)
    for feature in range(len(parents)):  # parents come before their children
        if parents[feature] >= 0:
            level[feature] = level[parents[feature]] + 1
    return level
