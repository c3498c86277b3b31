"""What differs between two models, told by a dictionary of both: its features' two decoder rows, and what they explain.

Everything is measured in units in which each site's activations have mean square 1 (divided by `scales`), so that the
louder model does not seem to own every feature. d_A and d_B are the rows with which a feature writes A and B, all of a
model's sites side by side; zero where the architecture has no such weight.

    relative norm   |d_B| / (|d_A| + |d_B|)      0: of A alone, 1: of B alone (Lindsey et al. 2024, crosscoders)
    cosine          <d_A, d_B> / (|d_A| |d_B|)   nan where one of them is zero, or the widths differ

    exclusive_A    relative norm below 0.1       shared   between 0.4 and 0.6
    exclusive_B    above 0.9                     other    the rest

Latent scaling (Minder et al. 2025, arXiv 2504.02922, section 2) asks whether a feature that looks exclusive is. With d
the longer of d_A and d_B (the owner's), f_t the codes, and y_t what is to be explained:

    beta = argmin over beta of sum_t |beta f_t d - y_t|^2 = sum_t f_t <d, y_t> / (|d|^2 sum_t f_t^2)

    y of beta_activation_m       the activation of model m, b_dec taken off
    y of beta_reconstruction_m   the reconstruction of it, b_dec taken off
    y of beta_error_m            activation - reconstruction; of the owner with the feature's own f_t d put back

    nu_reconstruction, nu_error  beta of the other model / beta of the owner

nu_error near 1: the other model has the feature as well, and the dictionary leaves it unexplained there (complete
shrinkage, an artefact of L1). nu_reconstruction near 1: the other model's reconstruction has it by means of other features
(latent decoupling). Near 0: the other model does not have it. Sums run over all tokens, or over those where the feature
is active at no less than a share of its maximum, in float64 without any approximation.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.statistics import SiteScale
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.units import Columns
from nndecomp.evaluation.decoder_pairs import KINDS, MODELS, Decoders, columns_by_model, kind_of
from nndecomp.evaluation.patching import exact
from nndecomp.types import Site

if TYPE_CHECKING:
    from pandas import DataFrame

_ENTRIES = 2**14  # active (token, feature) pairs whose rows are held at once


class Scaling:
    """Running sums of latent scaling: sum f^2 and, for each target y, sum f <d, y> over the tokens that count."""

    TARGETS = tuple(f"{what}_{model}" for what in ("activation", "reconstruction", "error") for model in MODELS)

    def __init__(self, decoders: Decoders, at_least: Float[Tensor, " feature"] | None = None) -> None:
        """at_least: codes below it are left out; null counts every active token."""
        self.decoders, n = decoders, decoders.starts[-1]
        self.owned_by_b = decoders.owned_by_b()
        same_width = decoders.rows["A"].shape == decoders.rows["B"].shape
        # The owner's row as far as each model has such coordinates.
        self.directions = {
            model: torch.where(self.owned_by_b[:, None], decoders.rows["B"], decoders.rows["A"])
            if same_width
            else decoders.rows[model] * (self.owned_by_b == (model == "B"))[:, None]
            for model in MODELS
        }
        self.comparable = same_width
        self.at_least = torch.zeros(n, dtype=torch.float64) if at_least is None else at_least
        self.squares = torch.zeros(n, dtype=torch.float64)
        self.products = {name: torch.zeros(n, dtype=torch.float64) for name in self.TARGETS}

    def add(self, codes: Codes, activation: Mapping[str, Tensor], reconstruction: Mapping[str, Tensor]) -> None:
        """`activation` and `reconstruction` [token, width] of each model, normalised, b_dec taken off, in float64."""
        for tokens, features, values in entries(codes, self.decoders.starts):
            kept = values.abs() >= self.at_least[features]
            tokens, features, values = tokens[kept], features[kept], values[kept]
            self.squares.index_add_(0, features, values.square())
            for model in MODELS:
                d, x, y_hat = (
                    self.directions[model][features],
                    activation[model][tokens],
                    reconstruction[model][tokens],
                )
                explained = {"activation": (d * x).sum(1), "reconstruction": (d * y_hat).sum(1)}
                explained["error"] = explained["activation"] - explained["reconstruction"]
                for what, products in explained.items():
                    self.products[f"{what}_{model}"].index_add_(0, features, values * products)

    def betas(self) -> dict[str, Float[Tensor, " feature"]]:
        """beta of every target; nan for features that were not active, and for a model of another width than the owner's."""
        norms = torch.maximum(self.decoders.norms("A"), self.decoders.norms("B"))
        whole = self.squares * norms.square()
        betas = {name: products / whole for name, products in self.products.items()}
        for model in MODELS:
            own = self.owned_by_b == (model == "B")
            betas[f"error_{model}"] = betas[f"error_{model}"] + own.double()  # f d put back adds exactly 1
            if not self.comparable:
                for what in ("activation", "reconstruction", "error"):
                    betas[f"{what}_{model}"] = betas[f"{what}_{model}"].masked_fill(~own, math.nan)
        return betas

    def ratios(self) -> dict[str, Float[Tensor, " feature"]]:
        """nu_reconstruction and nu_error: of the other model to the owner."""
        betas = self.betas()
        found = {}
        for what in ("reconstruction", "error"):
            a, b = betas[f"{what}_A"], betas[f"{what}_B"]
            found[f"nu_{what}"] = torch.where(self.owned_by_b, a / b, b / a)
        return found


def entries(codes: Codes, starts: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token, feature (numbered over all groups) and value of the active entries, some thousands at a time."""
    for group, start in zip(codes, starts, strict=False):
        tokens, features, values = group.entries()
        values = exact(values)
        place = values.device
        for some in zip(
            tokens.to(place).split(_ENTRIES),
            (features.to(place) + start).split(_ENTRIES),
            values.split(_ENTRIES),
            strict=True,
        ):
            yield tuple(each.cpu() for each in some)  # type: ignore[misc]


class Blocks:
    """Running sums of each group's share: activity, size of its contribution, and error with the group left out."""

    def __init__(self, decoders: Decoders, widths: Mapping[str, int]) -> None:
        self.decoders, self.n = decoders, 0
        n = decoders.starts[-1]
        self.firings = torch.zeros(n, dtype=torch.int64)
        self.squares = torch.zeros(n, dtype=torch.float64)
        self.maxima = torch.zeros(n, dtype=torch.float64)
        self.sums = {model: torch.zeros(width, dtype=torch.float64) for model, width in widths.items()}
        self.total, self.error = ({model: 0.0 for model in MODELS} for _ in range(2))
        self.ablated = {model: [0.0] * len(decoders.groups) for model in MODELS}

    def add(self, codes: Codes, activation: Mapping[str, Tensor], reconstruction: Mapping[str, Tensor]) -> None:
        starts = self.decoders.starts
        for _, features, values in entries(codes, starts):
            self.firings.index_add_(0, features, torch.ones_like(features))
            self.squares.index_add_(0, features, values.square())
            self.maxima.scatter_reduce_(0, features, values.abs(), "amax")
        self.n += codes.n_tokens
        for model in MODELS:
            x, y_hat, rows = activation[model], reconstruction[model], self.decoders.rows[model]
            self.sums[model] += x.sum(0)
            self.total[model] += float(x.square().sum())
            self.error[model] += float((x - y_hat).square().sum())
            for g, group in enumerate(codes):
                without = y_hat - exact(group.decode(rows[starts[g] : starts[g + 1]].to(group.values))).cpu()
                self.ablated[model][g] += float((x - without).square().sum())

    def variance(self, model: str) -> float:
        return self.total[model] - float(self.sums[model].square().sum()) / self.n

    def table(self) -> "DataFrame":
        """One row a group, and one for all of them."""
        import pandas

        starts, norms = self.decoders.starts, sum(self.decoders.norms(model).square() for model in MODELS)
        size = self.squares * norms
        rows = []
        for g, name in enumerate(self.decoders.groups):
            own = slice(starts[g], starts[g + 1])
            fired = self.firings[own].double() / self.n
            ablated = {f"fvu_without_{m}": self.ablated[m][g] / self.variance(m) for m in MODELS}
            rows.append(_block(name, fired, float(size[own].sum() / size.sum())) | ablated)
        whole = _block("all", self.firings.double() / self.n, 1.0)
        rows.append(whole | {f"fvu_without_{m}": math.nan for m in MODELS})
        fvus = {f"fvu_{m}": self.error[m] / self.variance(m) for m in MODELS}
        return pandas.DataFrame([row | fvus for row in rows])


def group_activity(dictionary: SparseDictionary, codes: Iterable[Codes]) -> "DataFrame":
    """Alive features, firing rate and l0 of each group, by the codes of some tokens."""
    import pandas

    n, firings = 0, [torch.zeros(bank.n_features, dtype=torch.int64) for bank in dictionary.banks]
    for each in codes:
        n += each.n_tokens
        for total, own in zip(firings, each.firings(), strict=True):
            total += own.cpu()
    names = [group.name for group in dictionary.spec.groups]
    return pandas.DataFrame([_active(name, own.double() / n) for name, own in zip(names, firings, strict=True)])


def _block(name: str, fired: Float[Tensor, " feature"], share: float) -> dict[str, object]:
    # share: of sum over tokens and features of f^2 (|d_A|^2 + |d_B|^2)
    return _active(name, fired) | {"share_of_size": share}


def _active(name: str, fired: Float[Tensor, " feature"]) -> dict[str, object]:
    """alive: active on some token. firing_rate: share of tokens a feature is active on, mean over the alive ones."""
    alive = fired > 0
    return {
        "group": name,
        "n_features": len(fired),
        "alive": alive.double().mean().item(),
        "firing_rate": fired[alive].mean().item() if alive.any() else 0.0,
        "l0": fired.sum().item(),
    }


@dataclass(frozen=True)
class ModelDiff:
    """features: one row each, of all groups. groups: one row each, and one for all."""

    features: "DataFrame"
    groups: "DataFrame"
    n_tokens: int

    def counts(self) -> dict[str, int]:
        """Features of each kind among those that were active."""
        kinds = self.features[self.features.frequency > 0].kind
        return {kind: int((kinds == kind).sum()) for kind in KINDS}

    def extremes(self, n: int, tokens: int) -> list[int]:
        """Rows of the `n` features that are most of A, then of the `n` that are most of B, among those active on at least
        `tokens` tokens: by relative norm, and where that is the same, those first that latent scaling finds least of in
        the other model."""
        seen = self.features[self.features.frequency * self.n_tokens >= tokens]
        doubt = seen.nu_error.abs() + seen.nu_reconstruction.abs()
        order = {
            model: seen.assign(doubt=doubt).sort_values(["relative_norm", "doubt"], ascending=[model == "A", True])
            for model in MODELS
        }
        return list(dict.fromkeys(int(row) for model in MODELS for row in order[model].index[:n]))


# What a dictionary reads and what it writes, at the same tokens, some at a time; asked for twice.
Pairs = Callable[[], Iterable[tuple[Float[Tensor, "token d_reads"], Float[Tensor, "token d_writes"]]]]


@torch.no_grad()
def model_diff(dictionary: SparseDictionary, scales: Mapping[Site, SiteScale], rows: Pairs, share: float) -> ModelDiff:
    """Two passes over `rows`: maxima and groups, then latent scaling over all tokens and over the most active ones.

    scales: what each site's rows are divided by. share: of a feature's maximum, from which on a token is one of its most
    active (columns that end in _max).
    """
    assert not dictionary.training, "a dictionary in training mode selects by batch; call eval() first"
    assert 0 < share <= 1, f"a share of {share} of the maximum"
    decoders, columns = Decoders.of(dictionary, scales), columns_by_model(dictionary)
    blocks = Blocks(decoders, {model: columns[model].stop - columns[model].start for model in MODELS})
    scale = exact(Columns(dictionary.write_layout, dictionary.write_layout, scales).s).cpu()
    b_dec = exact(dictionary.b_dec.detach()).cpu()

    def normalised(values: Tensor) -> dict[str, Tensor]:
        centred = (exact(values).cpu() - b_dec) / scale
        return {model: centred[:, columns[model]] for model in MODELS}

    def passes(*sums: Blocks | Scaling) -> None:
        for x, y in rows():
            y_hat, codes = dictionary(x)
            for each in sums:
                each.add(codes, normalised(y), normalised(y_hat))

    passes(blocks)
    everywhere, most = Scaling(decoders), Scaling(decoders, share * blocks.maxima)
    passes(everywhere, most)
    return ModelDiff(_features(decoders, blocks, everywhere, most), blocks.table(), blocks.n)


def _features(decoders: Decoders, blocks: Blocks, everywhere: Scaling, most: Scaling) -> "DataFrame":
    import pandas

    starts = decoders.starts
    relative = decoders.relative()
    sizes = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    columns: dict[str, object] = {
        "group": [name for name, size in zip(decoders.groups, sizes, strict=True) for _ in range(size)],
        "feature": [i for size in sizes for i in range(size)],
        "kind": [kind_of(r) for r in relative.tolist()],
        "relative_norm": relative.numpy(),
        "cosine": decoders.cosines().numpy(),
        "frequency": (blocks.firings.double() / blocks.n).numpy(),
    }
    norms = sum((decoders.norms(model).square() for model in MODELS), torch.zeros(starts[-1], dtype=torch.float64))
    columns["size"] = (blocks.squares * norms / blocks.n).numpy()
    for model in MODELS:
        columns[f"max_{model}"] = (blocks.maxima * decoders.norms(model)).numpy()  # the most it ever adds
    for suffix, scaling in (("", everywhere), ("_max", most)):
        columns |= {f"beta_{name}{suffix}": beta.numpy() for name, beta in scaling.betas().items()}
        columns |= {f"{name}{suffix}": ratio.numpy() for name, ratio in scaling.ratios().items()}
    return pandas.DataFrame(columns)
