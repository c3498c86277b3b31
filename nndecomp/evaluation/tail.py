"""What the least important components of a parameter decomposition still hold.

Of every decomposed map, over held-out text, with q the importance logits [token, C] and g = clip(q, 0, 1) the importances:

    rank            components by their mean logit, the largest first
    norm            |V_c| |U_c|, the Frobenius norm of the component; its share in all that follow a rank
    leftover        |M - V U| / |M|: what no component holds
    often           share of tokens on which g is above some bound
    kept            what predictions lose when a share of the components stays, mask 1, and the others are dropped, mask 0:
                    by token: those with the largest logits there;  by rank: the same for all tokens;  at random: one draw for all

The leftover is not added back. Logits are of the undisturbed run; components read what arrives.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.config.schema import EvaluationConfig
from nndecomp.config.tail import TailConfig
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.masks import Mask
from nndecomp.evaluation.bootstrap import Estimate, estimate, resamples
from nndecomp.evaluation.patching import Batch, Predictions, clean_run
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch


class Choice(Enum):
    """By what components are kept."""

    token = "by token"
    rank = "by rank"
    random = "at random"


@dataclass(frozen=True)
class MapTail:
    """Of one map; all but the last are by rank."""

    name: str
    component: Int[Tensor, " C"]  # its number in the map
    logit: Float[Tensor, " C"]  # mean over tokens
    V: Float[Tensor, " C"]  # norms
    U: Float[Tensor, " C"]
    often: Float[Tensor, " C"]
    leftover: float

    @property
    def norm(self) -> Float[Tensor, " C"]:
        return self.V * self.U

    def share_from(self) -> Float[Tensor, " C"]:
        """Of the sum of all norms, what this component and those after it hold."""
        return self.norm.flip(0).cumsum(0).flip(0) / self.norm.sum()

    def bands(self, n: int) -> list[slice]:
        """`n` runs of ranks, as even as they can be."""
        edges = torch.linspace(0, len(self.logit), n + 1).round().long().tolist()
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


@dataclass(frozen=True)
class Kept:
    """What keeping a share of the components costs, of one map while the others stay as they are, or of all at once."""

    map: str  # all, or a name
    choice: Choice
    share: float
    ce_increase: Estimate  # nats
    kl: Estimate


@dataclass(frozen=True)
class Tail:
    maps: tuple[MapTail, ...]
    kept: tuple[Kept, ...]
    n_tokens: int


Logits = Mapping[str, Float[Tensor, "batch pos C"]]


@torch.no_grad()
def tail(
    target: Target,
    decomposition: ParameterDecomposition,
    text: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    cfg: TailConfig,
    evaluation: EvaluationConfig,
    seed: int,
) -> Tail:
    """`keep`: the positions that count, and at which components stand in for the maps."""
    batches = list(_batches(text, keep, evaluation.batch_seqs, target.device))
    maps = _maps(target, decomposition, batches, cfg)
    draw = torch.Generator().manual_seed(seed)
    static = {
        each.name: {Choice.rank: each.component, Choice.random: torch.randperm(len(each.component), generator=draw)}
        for each in maps
    }
    sets = {"all": tuple(each.name for each in maps), **{each.name: (each.name,) for each in maps}}
    if len(maps) == 1:
        sets.pop("all")
    clean = Predictions(len(keep))
    lost = {(where, choice, share): Predictions(len(keep)) for where in sets for choice in Choice for share in cfg.kept}
    for batch in batches:
        undisturbed = clean_run(target, batch, [])
        clean.add(batch, undisturbed, undisturbed.log_p[None])
        logits = _logits(target, decomposition, batch)
        route = torch.zeros(batch.tokens.numel(), dtype=torch.bool, device=batch.tokens.device)
        route = route.index_fill(0, batch.kept, True).view_as(batch.tokens)
        for (where, choice, share), into in lost.items():
            masking = {
                name: Mask(_mask(logits[name], choice, share, static[name]), None, route) for name in sets[where]
            }
            with decomposition.installed(masking):
                found = target.logits(batch.tokens)
            into.add(batch, undisturbed, (each.float().log_softmax(-1) for each in found))
    drawn, before = resamples(len(keep), evaluation.bootstrap, seed), clean.means()["ce"]
    kept = [
        Kept(
            *key,
            estimate(means["ce"] - before, drawn, evaluation.confidence),
            estimate(means["kl"], drawn, evaluation.confidence),
        )
        for key, means in ((key, into.means()) for key, into in lost.items())
    ]
    return Tail(tuple(maps), tuple(kept), int(keep.sum()))


def _maps(
    target: Target, decomposition: ParameterDecomposition, batches: Sequence[Batch], cfg: TailConfig
) -> list[MapTail]:
    sums: dict[str, Tensor] = {}
    n = sum(len(batch.kept) for batch in batches)
    for batch in batches:
        for name, q in _logits(target, decomposition, batch).items():
            rows = q.flatten(0, 1).index_select(0, batch.kept).double()
            both = torch.stack([rows.sum(0), (rows.clamp(0, 1) > cfg.important).double().sum(0)])
            sums[name] = sums.get(name, torch.zeros_like(both)) + both
    leftover, found = decomposition.leftover(), []
    for name, own in decomposition.components.items():
        logit, often = (sums[name] / n).float()
        order = logit.argsort(descending=True)
        V, U = own.V.norm(dim=0), own.U.norm(dim=1)
        missing = float(leftover[name].norm() / decomposition.maps[name].matrix().norm())
        logit, V, U, often = (each[order].cpu() for each in (logit, V, U, often))
        found.append(MapTail(name, order.cpu(), logit, V, U, often, missing))
    return found


def _logits(target: Target, decomposition: ParameterDecomposition, batch: Batch) -> Logits:
    """Of the undisturbed run."""
    inputs: dict[str, Tensor] = {}
    with decomposition.recording(inputs):
        target.logits(batch.tokens)
    return {name: each.q for name, each in decomposition.importances(inputs).items()}


def _mask(
    q: Float[Tensor, "batch pos C"], choice: Choice, share: float, static: Mapping[Choice, Int[Tensor, " C"]]
) -> Float[Tensor, "batch pos C"]:
    """1 for the share of the components that is kept."""
    k = max(1, round(share * q.shape[-1]))
    mask = torch.zeros_like(q)
    if choice is Choice.token:
        return mask.scatter(-1, q.topk(k, sorted=False).indices, 1.0)
    return mask.index_fill(-1, static[choice][:k].to(q.device), 1.0)


def _batches(
    text: TokenBatch, keep: Bool[Tensor, "batch pos"], batch_seqs: int, device: torch.device
) -> Iterator[Batch]:
    for start in range(0, len(keep), batch_seqs):
        seqs = slice(start, min(start + batch_seqs, len(keep)))
        mask = text.mask[seqs]
        kept = keep[seqs].flatten().nonzero()[:, 0].to(device)
        yield Batch(text.tokens[seqs].to(device), kept, seqs, (mask[:, 1:] & mask[:, :-1]).to(device))
