"""Archetypal decoders: rows near the convex hull of data, which two seeds then agree on (Fel et al. 2025, arXiv 2502.12892).

    W_dec = (softmax(A) @ C + R) e^m      A [feature, archetype], C [archetype, d_write] data points less b_dec,
                                          R [feature, d_write] with |R_i| <= slack * mean |C_j - mean C|, m one number

While it is trained, W_dec is computed from A, R and m wherever it is read; `baked` makes plain parameters of them.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nndecomp.decompositions.group import Group
from nndecomp.decompositions.groups import SparseDictionary

# Weight with which a row begins on its own archetype; the rest is even over the others, so that all can be learned.
_OWN_WEIGHT = 0.9


class Archetypes(nn.Module):
    """The map from R, which stands in the place of W_dec, to W_dec."""

    def __init__(self, n_features: int, d_write: int, n_archetypes: int, slack: float) -> None:
        super().__init__()
        self.slack = slack
        self.A = nn.Parameter(torch.zeros(n_features, n_archetypes))
        self.m = nn.Parameter(torch.zeros(()))
        self.C: Tensor
        self.radius: Tensor
        self.register_buffer("C", torch.zeros(n_archetypes, d_write))
        self.register_buffer("radius", torch.zeros(()))  # mean |C_j - mean C|

    def forward(self, R: Float[Tensor, "feature d_write"]) -> Float[Tensor, "feature d_write"]:
        with torch.autocast(R.device.type, enabled=False):
            return (self.A.softmax(1) @ self.C + self.relaxed(R)) * self.m.exp()

    def relaxed(self, R: Float[Tensor, "feature d_write"]) -> Float[Tensor, "feature d_write"]:
        """R, with rows that are too long cut to slack * radius."""
        norm = R.norm(dim=1, keepdim=True)
        limit = self.slack * self.radius
        return R * torch.where(norm > limit, limit / norm.clamp_min(torch.finfo(R.dtype).tiny), 1.0)

    def right_inverse(self, W_dec: Float[Tensor, "feature d_write"]) -> Float[Tensor, "feature d_write"]:
        """What R begins as: nothing of the plain W_dec is kept."""
        return torch.zeros_like(W_dec)


@torch.no_grad()
def replace_decoder(bank: Group, n_archetypes: int, slack: float) -> None:
    """From here on W_dec is computed; it is zero until `place` or a checkpoint fills the archetypes."""
    archetypes = Archetypes(bank.n_features, bank.W_dec.shape[1], n_archetypes, slack).to(bank.W_dec.device)
    archetypes.m.copy_(bank.W_dec.norm(dim=1).mean().log())
    parametrize.register_parametrization(bank, "W_dec", archetypes, unsafe=True)


@torch.no_grad()
def place(bank: Group, points: Float[Tensor, "row d_write"]) -> None:
    """Archetypes are rows of what the group writes, less b_dec. Each feature starts at one of them, and rows of W_dec keep the
    mean norm that they had before they were computed.
    """
    archetypes = archetypes_of(bank)
    n = len(archetypes.C)
    assert len(points) >= n, f"{n} archetypes from {len(points)} rows"
    norm = archetypes.m.exp()
    archetypes.C.copy_(points[torch.linspace(0, len(points) - 1, n, device=points.device).long()])
    archetypes.radius.copy_((archetypes.C - archetypes.C.mean(0)).norm(dim=1).mean())
    own = torch.arange(bank.n_features, device=points.device) % n
    # Of n logits, one at l and the others at 0: its weight is e^l / (e^l + n - 1).
    logit = math.log(_OWN_WEIGHT / (1 - _OWN_WEIGHT) * max(n - 1, 1))
    archetypes.A.zero_().scatter_(1, own[:, None], logit)
    archetypes.m.zero_()
    archetypes.m.copy_((norm / bank.W_dec.norm(dim=1).mean()).log())


def archetypes_of(bank: Group) -> Archetypes:
    found = cast("nn.ModuleDict", bank.parametrizations)["W_dec"]
    (archetypes,) = cast("nn.ModuleList", found)
    assert isinstance(archetypes, Archetypes), f"group {bank.name} is parametrised by {type(archetypes).__name__}"
    return archetypes


def baked(dictionary: SparseDictionary) -> SparseDictionary:
    """A copy whose W_dec are plain parameters, with the values they have now."""
    plain = SparseDictionary(dictionary.spec).to(dictionary.b_dec)
    state = {name: value for name, value in dictionary.state_dict().items() if ".parametrizations." not in name}
    state |= {f"groups.{g}.W_dec": bank.W_dec.detach() for g, bank in enumerate(dictionary.banks)}
    plain.load_state_dict(state)
    return plain
