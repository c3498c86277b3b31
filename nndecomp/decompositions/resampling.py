"""Dead features start anew at inputs that are badly reconstructed (Bricken et al. 2023, Towards Monosemanticity, app.).

For each dead feature a token t is drawn with probability proportional to the square of its squared error. Then

    W_enc = share * mean norm of living rows * u,     u = unit vector of (x_t - mu)
    b_enc = -W_enc . mu                               mu = 0 where the input is centred by b_dec, else the batch's mean
    W_dec = mean norm of living rows * u where a group writes what it reads, else * the unit vector of y_t - y_hat_t

Groups that share an encoder share their features: these get one token, and each group's own decoder row. Nothing outside
the spans that a group reads and writes is touched, since it does not exist.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.decompositions.dead import families
from nndecomp.decompositions.groups import SparseDictionary

Rows = list[tuple[nn.Parameter, Int[Tensor, "row"]]]


@torch.no_grad()
def resample(
    dictionary: SparseDictionary,
    dead: Sequence[Int[Tensor, "_"]],
    x: RowsOrSequences,
    residual: Float[Tensor, "token d_writes"],
    share: float,
) -> Rows:
    """Rewrites the given features of each group; which rows of which parameters it has changed."""
    changed: Rows = []
    banks = dictionary.banks
    for family in families(dictionary):
        owner, own = banks[family[0]], dead[family[0]]
        if len(own) == 0:
            continue
        errors = torch.stack([residual[:, banks[g].writes].square().sum(1) for g in family]).sum(0)
        tokens = draw(errors, len(own))
        read = dictionary.read(x, family[0])
        mu = torch.zeros_like(read[0]) if dictionary.centres else read.mean(0)
        u = unit(read[tokens] - mu)
        shift = read.new_zeros(owner.n_features)  # W_enc . mu
        if owner.encoder is not None:
            W_enc = share * living_norm(owner.W_enc, own) * u
            shift[own] = W_enc @ mu
            for parameter in owner.encoder.parameters():  # a GLU's gate starts half open everywhere
                parameter[own] = 0
                changed.append((parameter, own))
            owner.W_enc[own], owner.b_enc[own] = W_enc, -shift[own]
        for g in family:
            bank = banks[g]
            direction = u if dictionary.spec.groups[g].reads == dictionary.spec.groups[g].writes else None
            if direction is None:
                direction = unit(residual[tokens][:, bank.writes])
            bank.W_dec[own] = living_norm(bank.W_dec, own) * direction
            changed.append((bank.W_dec, own))
            for parameter, start in dictionary.activation.starts(g):
                parameter[own] = start
                changed.append((parameter, own))
            dictionary.activation.fold_bias(g, shift)  # what other biases are to b_enc, they stay
    return changed


def draw(errors: Float[Tensor, "token"], n: int) -> Int[Tensor, "n"]:
    """n tokens, with probability proportional to errors^2; each at most once while there are enough."""
    share = errors / errors.mean().clamp_min(torch.finfo(errors.dtype).tiny)
    # No probability is 0: there are always as many tokens to draw as there are rows.
    return torch.multinomial(share.square() + 1e-12, n, replacement=n > len(errors))


def living_norm(W: Float[Tensor, "feature d"], dead: Int[Tensor, "dead"]) -> Float[Tensor, ""]:
    """Mean norm of the rows that are not dead; of all rows where none lives."""
    norms = W.norm(dim=1)
    living = norms.new_ones(len(norms)).index_fill(0, dead, 0.0)
    return torch.where(living.sum() > 0, (norms * living).sum() / living.sum().clamp_min(1), norms.mean())


def unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
