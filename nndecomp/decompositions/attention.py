"""Low-rank sparse attention: heads that read one direction and write one direction, in place of a layer of attention.

    q_t = R_t (x_t W_Q + b_Q),  k_u = R_u (x_u W_K + b_K)        one pair a pattern h; R turns with position as the target does
    A^h_tu = softmax over u <= t of (q_t . k_u) / sqrt(d_qk)
    z_t,i = sum over u <= t of A^h(i)_tu (x_u . v_i + b_i)       pre-activation of head i, h(i) its pattern
    y_t   = sum over active i of f_t,i o_i,  f = activation(z)    v_i is a row of W_enc, o_i of W_dec

He et al. 2025, Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition (Lorsa, arXiv 2504.20938), sec. 3.
Adjacent heads share a pattern. A row of A adds to 1, so z_t,i = (sum over u of A_tu x_u) . v_i + b_i: what a pattern carries to a
position is a row like any other, [token, pattern * d_read], and from there on a head is a feature of a dictionary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences, Sequences
from nndecomp.decompositions import kernels
from nndecomp.decompositions.base import GroupCost
from nndecomp.decompositions.encoders import LinearEncoder
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.selection import Found
from nndecomp.decompositions.spec import AttentionSpec, DictionarySpec, GroupSpec
from nndecomp.decompositions.support import Support


class AttentionGroup(Group):
    """A bank of rank-1 heads. Queries and keys are [pattern, d_qk, d_read]."""

    def make_encoder(self, spec: GroupSpec, whole: DictionarySpec) -> LinearEncoder:
        return PatternEncoder(_of(spec).n_heads, self.d_read, spec.n_features)

    def make_decoder(self, spec: GroupSpec, whole: DictionarySpec) -> None:
        super().make_decoder(spec, whole)
        n_heads, d_qk = _of(spec).n_heads, _of(spec).d_qk
        self.n_patterns, self.d_qk = n_heads, d_qk
        self.angles: Tensor
        self.register_buffer("angles", torch.tensor(_of(spec).rotary), persistent=False)
        self.W_Q, self.W_K = (nn.Parameter(torch.zeros(n_heads, d_qk, self.d_read)) for _ in range(2))
        # Without turning, a key's bias adds the same to all scores of a query, and changes nothing.
        self.b_Q, self.b_K = (nn.Parameter(torch.zeros(n_heads, d_qk)) for _ in range(2))

    def pattern(self, x: Float[Tensor, "batch pos d_read"]) -> Float[Tensor, "batch pattern pos pos"]:
        """A: how much of each earlier position is carried to each position."""
        q, k = (
            self._turned(torch.einsum("btd,hqd->bhtq", x, W) + b[:, None])
            for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K))
        )
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT * self.d_qk**-0.5).masked_fill(later, -torch.inf).softmax(-1)

    def _turned(self, rows: Float[Tensor, "batch pattern pos d_qk"]) -> Float[Tensor, "batch pattern pos d_qk"]:
        """Pairs (i, i + n/2) of the first n coordinates turn by their angle a position."""
        half = len(self.angles)
        if half == 0:
            return rows
        turned = torch.arange(rows.shape[2], device=rows.device)[:, None] * self.angles.to(rows.dtype)
        cos, sin = turned.cos(), turned.sin()
        a, b, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def seen(self, x: RowsOrSequences) -> Float[Tensor, "token carried"]:
        """What patterns carry to the positions that count, from all that are before them, side by side."""
        assert isinstance(x, Sequences), f"group {self.name} attends to earlier positions, so it takes whole sequences"
        patterns = self.pattern(x.values)
        carried = (patterns.flatten(1, 2) @ x.values).unflatten(1, patterns.shape[1:3])
        return x.at_kept(carried.transpose(1, 2).flatten(2))

    def contributions(
        self, x: Float[Tensor, "batch pos d_read"], features: Int[Tensor, "chosen"]
    ) -> Float[Tensor, "batch chosen pos pos"]:
        """How much each earlier position adds to z of some heads at each position, biases left out."""
        patterns = self.pattern(x)[:, features // (self.n_features // self.n_patterns)]
        return patterns * (x @ self.W_enc[features].T).mT[:, :, None]

    def costs(self, spec: GroupSpec) -> tuple[GroupCost, ...]:
        """A head has its v and its o; queries and keys, which every token needs, decide with all v what is active."""
        (whole,) = super().costs(spec)
        n_of_scores = self.W_Q.numel() + self.W_K.numel()
        return (
            GroupCost(
                name=self.name,
                n_components=self.n_features,
                parameters=self.d_read + self.d_write,
                n_writes=whole.n_writes,
                gate_parameters=self.n_features * self.d_read + n_of_scores,
                linear_parameters=0,
            ),
        )

    def fold(
        self, s_read: Float[Tensor, "d_read"], s_write: Float[Tensor, "d_write"], m_read: Float[Tensor, "d_read"]
    ) -> Float[Tensor, "d_write"]:
        """Scores are of (x - m) / s as well: W / s, b - W m / s."""
        for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K)):
            W.div_(s_read)
            b.sub_(W @ m_read)
        return super().fold(s_read, s_write, m_read)


def _of(spec: GroupSpec) -> AttentionSpec:
    assert spec.attention is not None, f"group {spec.name} does not attend"
    return spec.attention


class PatternEncoder(LinearEncoder):
    """z from what patterns carry, [token, pattern * d_read]: each feature reads its own pattern's part."""

    def __init__(self, n_patterns: int, d_read: int, n_features: int) -> None:
        super().__init__(d_read, n_features)
        self.n_patterns = n_patterns

    def affine(
        self, x: Float[Tensor, "token carried"], features: Int[Tensor, "chosen"] | slice | None = None
    ) -> tuple[Float[Tensor, "token _"], ...]:
        if isinstance(features, slice):
            return (self._adjacent(x, features) + self.b_enc[features],)
        own = self.W_enc.unflatten(0, (self.n_patterns, -1))
        carried = x.unflatten(1, (self.n_patterns, -1)).transpose(0, 1)
        pre = (carried @ own.mT).transpose(0, 1).flatten(1) + self.b_enc
        # Those chosen belong to any patterns, each with its own part of x: all are computed, whoever is asked for.
        return (pre if features is None else pre.index_select(1, features),)

    def _adjacent(self, x: Float[Tensor, "token carried"], features: slice) -> Float[Tensor, "token _"]:
        n, d = len(self.W_enc) // self.n_patterns, self.W_enc.shape[1]
        parts = []
        for pattern in range(features.start // n, -(-features.stop // n)):
            own = slice(max(features.start, pattern * n), min(features.stop, (pattern + 1) * n))
            parts.append(x[:, pattern * d : (pattern + 1) * d] @ self.W_enc[own].T)
        return torch.cat(parts, 1)

    def at(
        self, x: Float[Tensor, "token carried"], found: Found, centre: Float[Tensor, "d_read"] | None
    ) -> Float[Tensor, "slot"]:
        assert centre is None, "sequences carry their centre's gradient themselves"
        rows = x.reshape(len(x) * self.n_patterns, -1)
        (values,) = found.values
        return _AtPatterns.apply(rows, self.W_enc, self.b_enc, values, found.support, self.n_patterns)  # pyright: ignore[reportReturnType]


class _AtPatterns(torch.autograd.Function):
    """`kernels.active_pre` where a slot's row is that of its token and its feature's pattern."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, support: Support, n_patterns: int
    ) -> Float[Tensor, "slot"]:
        ctx.save_for_backward(rows, W_enc)
        ctx.support, ctx.n_patterns = support, n_patterns
        return values.to(W_enc.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, W_enc = ctx.saved_tensors
        support: Support = ctx.support
        need_rows, need_W, need_b, *_ = ctx.needs_input_grad
        pattern = support.indices // (support.n_features // ctx.n_patterns)
        row, order = (support.tokens * ctx.n_patterns + pattern).sort(stable=True)
        own = Support.of(row, support.indices[order], len(rows), support.n_features)
        sorted_grad = grad[order]
        grad_rows = kernels.bag(own, W_enc, sorted_grad) if need_rows else None
        grad_W = kernels.feature_sums(own, rows, sorted_grad) if need_W else None
        grad_b = grad.new_zeros(support.n_features).index_add_(0, support.indices, grad) if need_b else None
        return grad_rows, grad_W, grad_b, None, None, None
