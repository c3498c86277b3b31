"""Neurons ranked by what the model's own loss says of them: an oracle among baselines.

    score of neuron i at position t = |h_t,i dL/dh_t,i|,  L = sum over u >= t of -log p(token u+1 | tokens to u)

To first order, what setting the neuron to 0 there, and nothing else, would add to the loss. The gradient is the target's
own, from one backward pass of the undisturbed run. It sees what no other decomposition does: the token that is to be
predicted, and all the text that follows. L counts every prediction of a position that counts, and nothing else; where none
follows (the last position) all scores are 0, and |h| ranks.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, Sequences
from nndecomp.config.schema import Ranking
from nndecomp.decompositions.base import LiveRun
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.targets.base import Replace, Target
from nndecomp.types import Site


def loss_gradients(
    target: Target, tokens: Int[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "batch pos width"]]:
    """dL/dx at `sites`, L the summed cross-entropy of the tokens that are `counted`, each predicted by those before it."""
    visited: dict[Site, Tensor] = {}

    def watch(site: Site) -> Replace:
        def keep(value: Tensor) -> Tensor:
            # Weights are frozen: what comes before the first site has no gradient, and needs none.
            visited[site] = value if value.requires_grad else value.detach().requires_grad_()
            return visited[site]

        return keep

    with torch.enable_grad(), target.patch({site: watch(site) for site in sites}):
        log_p = target.logits(tokens)[:, :-1].float().log_softmax(-1)
        loss = -(log_p.gather(-1, tokens[:, 1:, None])[..., 0] * counted[:, 1:]).sum()
        gradients = torch.autograd.grad(loss, [visited[site] for site in sites])
    return {site: gradient.float() for site, gradient in zip(sites, gradients, strict=True)}


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
        gradients = loss_gradients(self._target, x.tokens, counted.view_as(x.tokens), self.reads)
        codes = []
        for g, site in enumerate(self.reads):
            hidden = x[:, self.read_layout.spans[site]].rows()
            scores = (hidden * x.at_kept(gradients[site])).abs()
            scores = torch.where(scores.amax(1, keepdim=True) > 0, scores, hidden.abs())
            codes.append(self.keep_first(hidden, scores, g))
        return torch.cat([self.decode_layer(each, g) for g, each in enumerate(codes)], 1), Codes(tuple(codes))

    def live_obstacle(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (
            "attribution ranks neurons by the gradient of a loss that is only known when the run is over, and a run that "
            "is being changed is not"
        )

    def live_run(self) -> LiveRun:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError(f"there is no live run: {self.live_obstacle()}")
