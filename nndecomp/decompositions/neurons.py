"""The baseline that needs no training: the MLPs' own neurons, of which each token keeps the first few of a ranking.

    h [token, d_mlp]  at mlp_hidden;  y_hat = mlp_out of (h where its score is among the k largest of the token, else 0)

    activation    |h|
    output_norm   |h| |w|, w what the neuron writes when it is worth 1, before a post-norm if there is one
    attribution   |h dL/dh|, averaged on the way from silent neurons to these: see attribution.py

y_hat is computed by the model's own modules, so with k = d_mlp it is the model.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.config.schema import Architecture, Ranking
from nndecomp.decompositions.base import Decomposition, GroupCost
from nndecomp.decompositions.codes import Codes, SparseCodes
from nndecomp.decompositions.selection import topk_support
from nndecomp.decompositions.support import Support
from nndecomp.targets.base import Target
from nndecomp.types import Layout, Point, Site


class NeuronBaseline(Decomposition):
    """The k first neurons of each token and layer by `ranking`; `k` is one number a layer.

    A neuron counts as what it reads (one vector; two in a gated MLP) and one vector written, d_model weights each.
    Choosing among neurons needs all their activations, hence all read vectors, as an encoder does.
    """

    def __init__(
        self, target: Target, layers: Sequence[int], k: Sequence[int], ranking: Ranking = Ranking.activation
    ) -> None:
        super().__init__()
        shape = target.shape.of(None)
        d_model, d_mlp, d_read = shape.d_model, shape.d_mlp, shape.d_read_neuron
        assert len(layers) == len(k), f"{len(k)} values of k for {len(layers)} layers"
        assert all(0 < each <= d_mlp for each in k), f"k={list(k)} of {d_mlp} neurons"
        self.eval()  # there is nothing to train
        self.layers, self.k, self.ranking = tuple(layers), tuple(k), ranking
        self._mlp_out_of, self.device = target.mlp_out_of, target.device
        self.reads = tuple(Site(layer, Point.mlp_hidden) for layer in layers)
        self.writes = tuple(Site(layer, Point.mlp_out) for layer in layers)
        self.read_layout = Layout.of(dict.fromkeys(self.reads, d_mlp))
        self.write_layout = Layout.of(dict.fromkeys(self.writes, d_model))
        self.costs = tuple(
            GroupCost(
                name=f"L{layer}",
                n_components=d_mlp,
                parameters=d_read + d_model,
                n_writes=1,
                gate_parameters=d_mlp * d_read,
                linear_parameters=0,
            )
            for layer in layers
        )
        # Of each layer, what |h| is multiplied with; None: 1.
        weighs = ranking is Ranking.output_norm
        self.norms = [target.neuron_writes(layer).float().norm(dim=1) if weighs else None for layer in layers]

    @property
    def family(self) -> str:
        """As rows and figures name it."""
        neurons = Architecture.neurons.value
        return neurons if self.ranking is Ranking.activation else f"{neurons}_by_{self.ranking.value}"

    def score(self, hidden: Float[Tensor, "token d_mlp"], group: int) -> Float[Tensor, "token d_mlp"]:
        """By which a token's neurons are ranked."""
        norms = self.norms[group]
        return hidden.abs() if norms is None else hidden.abs() * norms

    def encode_layer(self, hidden: Float[Tensor, "token d_mlp"], group: int) -> SparseCodes:
        return self.keep_first(hidden, self.score(hidden, group), group)

    def keep_first(
        self, hidden: Float[Tensor, "token d_mlp"], scores: Float[Tensor, "token d_mlp"], group: int
    ) -> SparseCodes:
        """The k neurons with the largest scores. Codes keep the neurons' sign."""
        support = topk_support(scores.detach(), self.k[group])
        sorted_support = Support(
            support.indices.view(-1, self.k[group]).sort(1).values.flatten(), support.offsets, support.n_features
        )
        return SparseCodes(hidden[sorted_support.tokens, sorted_support.indices], sorted_support)

    def written(self, group: int) -> Float[Tensor, "neuron d_model"]:
        """What each neuron of a layer adds to its mlp_out when it is worth 1 and alone."""
        n, device = self.costs[group].n_components, self.device
        alone = self._mlp_out_of(self.layers[group], torch.eye(n, device=device))
        return alone - self._mlp_out_of(self.layers[group], torch.zeros(1, n, device=device))

    def decode_layer(self, codes: SparseCodes, group: int) -> Float[Tensor, "token d_model"]:
        return self._mlp_out_of(self.layers[group], codes.dense())

    def forward(self, x: RowsOrSequences) -> tuple[Float[Tensor, "token d_writes"], Codes]:
        hidden = [rows_of(x)[:, self.read_layout.spans[site]] for site in self.reads]
        codes = [self.encode_layer(h, g) for g, h in enumerate(hidden)]
        return torch.cat([self.decode_layer(c, g) for g, c in enumerate(codes)], 1), Codes(tuple(codes))

    def live_obstacle(self) -> None:
        return None

    def live_run(self) -> "NeuronRun":
        return NeuronRun(self)


class NeuronRun:
    def __init__(self, baseline: NeuronBaseline) -> None:
        self._baseline = baseline
        self._codes: dict[int, SparseCodes] = {}

    def read(self, site: Site, value: RowsOrSequences) -> None:
        group = self._baseline.reads.index(site)
        self._codes[group] = self._baseline.encode_layer(rows_of(value), group)

    def write(self, site: Site) -> Float[Tensor, "token width"]:
        group = self._baseline.writes.index(site)
        assert group in self._codes, f"{site} is written before {self._baseline.reads[group]} was read"
        return self._baseline.decode_layer(self._codes[group], group)

    def active(self) -> Codes:
        n_groups = len(self._baseline.layers)
        assert len(self._codes) == n_groups, f"{len(self._codes)} of {n_groups} layers have been read"
        return Codes(tuple(self._codes[g] for g in range(n_groups)))
