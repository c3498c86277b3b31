"""Rows made of features that are known: superposed, sparse, at one site, several, or in two models.

    x_site = bias_site + sum over features i of  f_i s_i,site d_i,site  +  noise

f is the same at all sites: what is read at one and written at another (a transcoder), at several layers (a crosscoder),
or by two models. Directions depend on the seed and the site alone, so a site holds the same features whichever sites
stand beside it; a batch depends on the seed, the split and its number alone, so resuming needs one number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.synthetic_codes import Firing, generator
from nndecomp.activations.truth import Truth
from nndecomp.config.schema import SyntheticConfig, require
from nndecomp.targets.base import Shape
from nndecomp.types import Layout, Site

N_PUSHES = 2000  # steps of pushing directions apart before it is given up


class World:
    """The features of a configuration at some sites. Raises SettingError for what cannot be."""

    def __init__(self, cfg: SyntheticConfig, shape: Shape, sites: Sequence[Site]) -> None:
        self.cfg, self.shape, self.firing = cfg, shape, Firing(cfg)
        self.layout = Layout.of({site: shape.width(site) for site in sites})
        require(
            cfg.exclusive is None or len(shape.models) == 2,
            f"activations.synthetic.exclusive={cfg.exclusive} needs two models; write +target@paired_target=synthetic, or null",
        )
        exclusive_a, exclusive_b = cfg.exclusive or [0, 0]
        n = cfg.n_features
        first_a, first_b = n - exclusive_a - exclusive_b, n - exclusive_b
        self.classes: dict[str, Int[Tensor, " _"]] = {}
        if len(shape.models) == 2:
            edges = {"shared": (0, first_a), "A": (first_a, first_b), "B": (first_b, n)}
            self.classes = {name: torch.arange(*edge) for name, edge in edges.items() if edge[0] < edge[1]}
        if cfg.trees:
            parents = self.firing.parents
            self.classes |= {"parents": parents[parents >= 0].unique(), "children": (parents >= 0).nonzero()[:, 0]}
        self.directions = {
            site: self._strengths(site)[:, None] * self._unit_directions(site) for site in self.layout.sites
        }
        self.bias = {site: cfg.bias * _unit(1, shape.width(site), cfg.seed, "bias", str(site))[0] for site in sites}
        self.dense = torch.cat([self.directions[site] for site in self.layout.sites], 1)

    def _unit_directions(self, site: Site) -> Float[Tensor, "feature width"]:
        cfg, width, rho = self.cfg, self.layout.width_of(site), self.cfg.persistence
        fresh = lambda layer: _unit(  # noqa: E731
            cfg.n_features, width, cfg.seed, site.model, site.point.value, site.head, layer
        )
        # Between adjacent layers directions turn by arccos(rho); at 0 they forget, and only this layer's are drawn.
        first = site.layer if rho == 0 else 0
        directions = fresh(first)
        for layer in range(first + 1, site.layer + 1):
            directions = _rows_of_norm_1(rho * directions + (1 - rho**2) ** 0.5 * fresh(layer))
        return directions if cfg.coherence is None else pushed_apart(directions, cfg.coherence)

    def _strengths(self, site: Site) -> Float[Tensor, "feature"]:
        """fade^(layers since birth); 0 before, and at the other model's sites."""
        cfg = self.cfg
        n_layers = self.shape.of(site.model).n_layers
        born = torch.zeros(cfg.n_features, dtype=torch.int64)
        if cfg.births:
            born = torch.randint(n_layers, (cfg.n_features,), generator=generator(cfg.seed, "births"))
        age = site.layer - born
        strength = torch.where(age >= 0, cfg.fade ** age.float(), 0.0)
        other = {"A": "B", "B": "A"}.get(site.model or "")
        if other in self.classes:
            strength[self.classes[other]] = 0.0
        return strength

    def draw(
        self, n_tokens: int, *label: object
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        """Fresh rows and the codes they are made of; the same for the same label."""
        draw = generator(self.cfg.seed, *label)
        codes = self.firing.draw(n_tokens, draw)
        rows = codes @ self.dense
        for site, span in self.layout.spans.items():
            rows[:, span] += self.bias[site]
        if self.cfg.noise > 0:
            rows += self.cfg.noise * torch.randn(rows.shape, generator=draw)
        return rows, codes

    def heldout(self, n_tokens: int) -> Truth:
        """Rows that training never sees, with all that is known about them."""
        rows, codes = self.draw(n_tokens, "heldout")
        return Truth(self.layout, rows, codes, self.directions, self.bias, self.firing.parents, self.classes)


class SyntheticStream:
    """Endless rows of a world: a `RowStream`, and a `RowSource` for what looks at rows before training.

    `seed` decides which tokens come, `activations.synthetic.seed` what they are made of.
    """

    def __init__(self, world: World, batch_tokens: int, seed: int, device: torch.device) -> None:
        self.world, self.layout, self.device = world, world.layout, device
        self.batch_tokens, self.seed, self.n_batches = batch_tokens, seed, 0
        self.dtype = torch.float32

    @property
    def rows_at_most(self) -> int:
        return self.batch_tokens

    def next_batch(self) -> Float[Tensor, "token width"]:
        rows, _ = self.world.draw(self.batch_tokens, "train", self.seed, self.n_batches)
        self.n_batches += 1
        return rows.to(self.device)

    def next_rows(self) -> Float[Tensor, "token width"]:
        """Rows are drawn one by one, so there is nothing to shuffle."""
        return self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        return {"n_batches": self.n_batches, "batch_tokens": self.batch_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["batch_tokens"] == self.batch_tokens, f"saved with {state}, not batches of {self.batch_tokens}"
        self.n_batches = state["n_batches"]


def _rows_of_norm_1(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True)


def _unit(n: int, d: int, *label: object) -> Float[Tensor, "n d"]:
    """n random unit vectors, the same for the same label."""
    return _rows_of_norm_1(torch.randn(n, d, generator=generator("directions", *label)))


def pushed_apart(directions: Float[Tensor, "n d"], coherence: float) -> Float[Tensor, "n d"]:
    """Unit rows near `directions` no two of which have a |cosine| above `coherence`.

    n <= d: orthogonal rows, which is best of all. Else descent on the excess, d_i <- d_i - sum over j of
    excess_ij sign(cos_ij) d_j / 2, which stops when there is none. SettingError below Welch's bound, sqrt((n - d) /
    (d (n - 1))) (Welch 1974, equation 12), or where N_PUSHES steps do not get there.
    """
    n, d = directions.shape
    if n <= d:
        q, r = torch.linalg.qr(directions.T.double())
        return (q * r.diagonal().sign()).T.float()
    bound = ((n - d) / (d * (n - 1))) ** 0.5
    reached = float("nan")
    if coherence > bound:
        rows = directions.double()
        for _ in range(N_PUSHES):
            cosine = (rows @ rows.T).fill_diagonal_(0)
            reached = cosine.abs().max().item()
            if reached <= coherence:
                return rows.float()
            # Aiming a little lower than asked ends the descent in finitely many steps.
            excess = (cosine.abs() - 0.98 * coherence).clamp(min=0) * cosine.sign()
            rows = _rows_of_norm_1(rows - 0.5 * excess @ rows)
    require(
        False,
        f"activations.synthetic.coherence={coherence} is out of reach for {n} directions in {d} coordinates "
        f"({f'{reached:.3f} was reached' if reached == reached else f'below the bound {bound:.3f}'}); write more",
    )
    raise AssertionError
