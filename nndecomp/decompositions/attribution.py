"""Neurons ranked by what the model's own loss says of them: an oracle among baselines.

    score of neuron i at position t = |h_t,i  mean over a of dL/dx_t,i at x = a h|
    L = sum over u of -log p(token u+1 | tokens to u), with x in the place of the neurons of all the layers

for a = 1/2m, 3/2m, ..., 1 - 1/2m: integrated gradients (Sundararajan, Taly & Yan 2017, arXiv 1703.01365, equation 1) on the
straight line from silent neurons to those of the undisturbed run. Signed and without bars they add to what silencing
all of them costs. The gradient at h alone (a = 1) says what silencing one neuron would do; with nearly all of them silent that
is another question, and it ranks worse than |h| does. A post-norm undoes the scale a, and all that is left is that gradient.

It sees what no other decomposition does: the token that is to be predicted, and all the text that follows. L counts
predictions of positions that count, and nothing else; where none follows (the last position) all scores are 0, and |h| ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, Sequences
from nndecomp.config.schema import Ranking
from nndecomp.decompositions.base import LiveRun
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.targets.base import Target
from nndecomp.types import Site

STEPS = 5  # m; 20 rank as well as 5 do


def loss_gradients(
    target: Target,
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    values: Mapping[Site, Float[Tensor, "batch pos _"]],
) -> dict[Site, Float[Tensor, "batch pos _"]]:
    """dL/dx of values x put in the place of what is at their sites, L the summed cross-entropy of the `counted` tokens."""
    inputs = {site: value.detach().clone().requires_grad_() for site, value in values.items()}
    with torch.enable_grad(), target.patch({site: lambda _, x=x: x for site, x in inputs.items()}):
        log_p = target.logits(tokens)[:, :-1].float().log_softmax(-1)
        loss = -(log_p.gather(-1, tokens[:, 1:, None])[..., 0] * counted[:, 1:]).sum()
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def attributions(
    target: Target,
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    values: Mapping[Site, Float[Tensor, "batch pos _"]],
    steps: int = STEPS,
) -> dict[Site, Float[Tensor, "batch pos _"]]:
    """x times the mean of dL/dx on the way from 0 to x at the `counted` positions; others stay, and have none."""
    here = counted[..., None].float()
    sums = {site: torch.zeros_like(x) for site, x in values.items()}
    for step in range(steps):
        share = 1 - here * (1 - (step + 0.5) / steps)
        for site, gradient in loss_gradients(
            target, tokens, counted, {site: share * x for site, x in values.items()}
        ).items():
            sums[site] += gradient
    return {site: here * x * sums[site] / steps for site, x in values.items()}


class AttributedNeurons(NeuronBaseline):
    """x is `Sequences` of the undisturbed run with their text: what was active there says nothing of another run."""

    def __init__(self, target: Target, layers: Sequence[int], k: Sequence[int]) -> None:
        super().__init__(target, layers, k, Ranking.attribution)
        self._target = target

    @property
    def needs_sequences(self) -> bool:
        return True

    def forward(self, x: RowsOrSequences) -> tuple[Float[Tensor, "token d_writes"], Codes]:
        assert isinstance(x, Sequences) and x.tokens is not None, "attribution needs whole sequences and their text"
        counted = torch.zeros(x.tokens.numel(), dtype=torch.bool, device=x.tokens.device)
        counted[x.kept] = True
        values = {site: x.values[..., self.read_layout.spans[site]] for site in self.reads}
        found = attributions(self._target, x.tokens, counted.view_as(x.tokens), values)
        codes = []
        for g, site in enumerate(self.reads):
            hidden, scores = x.at_kept(values[site]), x.at_kept(found[site]).abs()
            scores = torch.where(scores.amax(1, keepdim=True) > 0, scores, hidden.abs())
            codes.append(self.keep_first(hidden, scores, g))
        return torch.cat([self.decode_layer(each, g) for g, each in enumerate(codes)], 1), Codes(tuple(codes))

    def live_obstacle(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (
            "attribution ranks neurons by gradients of a loss that is only known when the run is over, and a run that "
            "is being changed is not"
        )

    def live_run(self) -> LiveRun:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError(f"there is no live run: {self.live_obstacle()}")
