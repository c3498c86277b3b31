"""The two decoder rows of each feature of a dictionary of two models, and what their lengths say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.activations.statistics import SiteScale
from nndecomp.config.schema import CodeNormalisation, require
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import require_rows
from nndecomp.decompositions.units import Columns
from nndecomp.evaluation.patching import exact
from nndecomp.types import Site

MODELS = ("A", "B")
EXCLUSIVE, SHARED = 0.1, (0.4, 0.6)
KINDS = ("exclusive_A", "shared", "exclusive_B", "other", "zero")

Rows = Float[Tensor, "feature width"]


def relative_norms(norm_a: Float[Tensor, " feature"], norm_b: Float[Tensor, " feature"]) -> Float[Tensor, " feature"]:
    """|d_B| / (|d_A| + |d_B|); nan where both are zero."""
    return norm_b / (norm_a + norm_b)


def kind_of(relative_norm: float) -> str:
    """To which of `KINDS` a feature with this relative norm is counted."""
    match relative_norm:
        case r if math.isnan(r):
            return "zero"
        case r if r < EXCLUSIVE:
            return "exclusive_A"
        case r if r > 1 - EXCLUSIVE:
            return "exclusive_B"
        case r if SHARED[0] <= r <= SHARED[1]:
            return "shared"
        case _:
            return "other"


@dataclass(frozen=True)
class Decoders:
    """The decoder rows of all features of all groups in each model, in normalised units and float64."""

    rows: dict[str, Rows]  # by model
    groups: tuple[str, ...]  # names
    starts: tuple[int, ...]  # the first feature of each group, and the number of all

    @staticmethod
    def of(dictionary: SparseDictionary, scales: Mapping[Site, SiteScale]) -> "Decoders":
        """Raises SettingError for a dictionary that is not of two models, or whose features have codes at each site."""
        layout, spec = dictionary.write_layout, dictionary.spec
        models = sorted({str(site.model) for site in layout.sites})
        require(
            models == list(MODELS),
            f"decomposition.writes has sites of {', '.join(models)}, but a difference is between models A and B; "
            "write for example [A:resid_post,B:resid_post]",
        )
        require(
            spec.activation.code_normalisation is not CodeNormalisation.decoupled,
            "decomposition.code_normalisation=decoupled gives a feature other codes in each model, which a difference of "
            "decoder rows does not describe; write none, sae, crosscoder or mixed",
        )
        require_rows(dictionary.banks, "the models cannot be compared by decoder rows")
        scale = exact(Columns(layout, layout, scales).s)
        whole = []
        for bank in dictionary.banks:
            placed = torch.zeros(bank.n_features, layout.width, dtype=torch.float64)
            placed[:, bank.writes] = exact(bank.W_dec.detach()).cpu() / scale[bank.writes]
            whole.append(placed)
        placed, columns = torch.cat(whole), columns_by_model(dictionary)
        starts = [0]
        for bank in dictionary.banks:
            starts.append(starts[-1] + bank.n_features)
        return Decoders(
            {model: placed[:, columns[model]] for model in MODELS},
            tuple(group.name for group in spec.groups),
            tuple(starts),
        )

    def norms(self, model: str) -> Float[Tensor, " feature"]:
        return self.rows[model].norm(dim=1)

    def relative(self) -> Float[Tensor, " feature"]:
        return relative_norms(self.norms("A"), self.norms("B"))

    def cosines(self) -> Float[Tensor, " feature"]:
        a, b = self.rows["A"], self.rows["B"]
        if a.shape != b.shape:
            return torch.full((len(a),), math.nan, dtype=torch.float64)
        return (a * b).sum(1) / (self.norms("A") * self.norms("B"))

    def owned_by_b(self) -> Bool[Tensor, " feature"]:
        return self.norms("B") > self.norms("A")


def columns_by_model(dictionary: SparseDictionary) -> dict[str, slice]:
    """Which columns of what a dictionary writes are each model's: layouts put a model's sites side by side."""
    layout = dictionary.write_layout
    found = {}
    for model in MODELS:
        spans = [layout.spans[site] for site in layout.sites if site.model == model]
        found[model] = slice(spans[0].start, spans[-1].stop)
    return found
