"""Dictionaries whose active features are given: what they compute while the choice of features is held constant.

    f = a * v(z)        a [token, feature]: 1 where active;  v(z): the code of an active feature (`when_active`)

With its own active set a held dictionary is the dictionary; with another it says what other features would have made of the
same input. Its Jacobian is that of the dictionary wherever a small step changes no choice: W_dec.T diag(a) W_enc + W_skip.T with a linear
encoder.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.activation_base import ActivationFunction, Pointwise
from nndecomp.decompositions.codes import Codes
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.pursuit import MatchingPursuit
from nndecomp.errors import SettingError

PURSUES = (
    "decomposition.activation=matching_pursuit finds codes step by step, so active features cannot be held while they are "
    "differentiated; write another activation function"
)
Masks = Sequence[Float[Tensor, "token _"]]  # of each group, a


class Held(Pointwise):
    """The activation function of a held dictionary; `masks` are written before every pass."""

    def __init__(self, own: ActivationFunction) -> None:
        super().__init__()
        self.own = own
        self.masks: Masks = ()

    def forward(
        self,
        pre: Float[Tensor, "*entry"],
        group: int,
        c: Float[Tensor, "feature"] | None,
        b_enc: Float[Tensor, "feature"],
        at: Int[Tensor, "slot"] | None = None,
    ) -> Float[Tensor, "*entry"]:
        mask = self.masks[group]
        assert mask.shape == pre.shape, f"group {group}: a mask {tuple(mask.shape)} for codes {tuple(pre.shape)}"
        return self.own.when_active(pre, group, b_enc) * mask

    def floor(self, group: int, learns: bool) -> Float[Tensor, "feature"] | None:
        """What is held may be active wherever it is."""
        return None


def hold(dictionary: SparseDictionary) -> tuple[SparseDictionary, Held]:
    """A copy with frozen weights whose active features are those of the second return value's `masks`.

    Raises SettingError for a pursuit, whose codes are no function of single pre-activations.
    """
    assert not dictionary.training, "hold a dictionary in eval mode: in training, selection depends on the batch"
    if isinstance(dictionary.activation, MatchingPursuit):
        raise SettingError(PURSUES)
    held = copy.deepcopy(dictionary).requires_grad_(False)
    activation = Held(held.activation)
    held.activation = activation
    return held.eval(), activation


def masks_of(codes: Codes) -> Masks:
    """1 where a feature is active."""
    return [(group.dense() != 0).to(torch.get_default_dtype()) for group in codes]
