"""What training minimises: pure functions of activations, codes and weights. Every one is a mean over tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.config.schema import Penalty, Reconstruction
from nndecomp.decompositions.codes import Codes
from nndecomp.types import Layout


def reconstruction(
    residual: Float[Tensor, "token d_writes"],
    y: Float[Tensor, "token d_writes"],
    kind: Reconstruction,
    layout: Layout,
) -> Float[Tensor, ""]:
    """Of residual = y - y_hat. The three kinds differ in scale and are never mixed; see `Reconstruction`."""
    match kind:
        case Reconstruction.sum_of_squares:
            return residual.square().sum(-1).mean()
        case Reconstruction.mean_of_squares:
            return residual.square().mean()
        case Reconstruction.norm:
            return torch.stack([residual[:, span].norm(dim=1).mean() for span in layout.spans.values()]).mean()
        case Reconstruction.normalised:
            return fvu(residual, y, layout)


def fvu(
    residual: Float[Tensor, "token d_writes"], y: Float[Tensor, "token d_writes"], layout: Layout
) -> Float[Tensor, ""]:
    """Mean over written sites of sum |y - y_hat|^2 / sum |y - mean y|^2, the mean taken per coordinate over the batch."""
    columns = residual.square().sum(0)
    spread = (y - y.mean(0)).square().sum(0)
    return torch.stack([columns[span].sum() / spread[span].sum() for span in layout.spans.values()]).mean()


def penalty(codes: Codes, c: Sequence[Float[Tensor, "_"]], kind: Penalty, scale: float) -> Float[Tensor, ""]:
    """Sum over the features of all groups, mean over tokens. `c`: the weight of each group's features, see
    `decoder_scale`; gradients reach the decoder through it.

        l1               sum f c                  c = |d|: Anthropic, April 2024 update
        tanh             sum tanh(s f c)          Anthropic, crosscoders 2024; s = `scale`

    The straight-through l0 needs pre-activations: see `l0`.
    """
    match kind:
        case Penalty.l1:
            terms = [group.weighted(weights) for group, weights in zip(codes, c, strict=True)]
        case Penalty.tanh:
            terms = [(scale * group.weighted(weights)).tanh() for group, weights in zip(codes, c, strict=True)]
        case other:
            raise AssertionError(f"penalty {other.value} is not a function of codes")
    return torch.stack([term.sum() for term in terms]).sum() / codes.n_tokens


def l0(active: Sequence[Float[Tensor, "token _"]]) -> Float[Tensor, ""]:
    """Active features a token, over all groups, from straight-through indicators (`JumpRelu.active`)."""
    return torch.stack([group.sum() for group in active]).sum() / active[0].shape[0]


def aux_k(
    residual: Float[Tensor, "token d_write"],
    x: Float[Tensor, "token d_read"],
    W_enc: Float[Tensor, "feature d_read"],
    b_enc: Float[Tensor, "feature"],
    W_dec: Float[Tensor, "feature d_write"],
    dead: Int[Tensor, "dead"],
    k: int,
) -> Float[Tensor, ""]:
    """How badly a group's dead features alone explain what the others left over (Gao et al. 2024, app. A.2).

        e = sg(y - y_hat),  e_hat = the k largest dead pre-activations, clipped at 0, decoded without bias
        |e - e_hat|^2 / |e - mean e|^2

    Only dead rows are touched. The input is detached as well, so that nothing but dead features learns from it.
    """
    assert len(dead) > 0, "aux_k of a group without dead features"
    residual = residual.detach()
    pre = torch.nn.functional.linear(x.detach(), W_enc[dead], b_enc[dead])
    values, indices = pre.topk(min(k, len(dead)), sorted=False)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    error = (residual - codes @ W_dec[dead]).square().sum()
    spread = (residual - residual.mean(0)).square().sum()
    return torch.where(spread > 0, error / spread.clamp_min(torch.finfo(spread.dtype).tiny), error.new_zeros(()))


def dead_features(tokens_since_fired: Int[Tensor, "feature"], dead_after_tokens: int) -> Bool[Tensor, "feature"]:
    """Features that have not fired for so many tokens."""
    return tokens_since_fired >= dead_after_tokens
