"""What a parameter decomposition is trained on: a model, its batches, and how far its outputs are from the undisturbed ones.

language model    mean over real positions of KL(P || Q), nats; P from the undisturbed run, Q from the masked one
vectors           mean over entries of (y - y_hat)^2; a row that counts n times is n rows
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nndecomp.activations.sparse_features import CountedRows
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.end_to_end import CHUNK_VALUES


@runtime_checkable
class Subject(Protocol):
    @property
    def model(self) -> nn.Module:
        """Whose maps are decomposed."""
        ...

    def run(self, batch: Any, /) -> Tensor:
        """The model's output, as far as `divergence` needs it."""
        ...

    def reference(self, clean: Tensor, /) -> Tensor:
        """What `divergence` wants to know of the undisturbed run's output, made once a step."""
        ...

    def divergence(self, reference: Tensor, masked: Tensor, batch: Any, /) -> Float[Tensor, ""]: ...

    def real(self, batch: Any, /) -> Bool[Tensor, "*rows"] | Float[Tensor, "*rows"] | None:
        """Which positions count, or how often each does; null: all once."""
        ...


class LanguageModel:
    """`run` ends where the LM head begins: logits exist for some positions at a time, CHUNK_VALUES of them at most."""

    def __init__(self, target: Target, chunk_values: int = CHUNK_VALUES) -> None:
        self.target = target
        self.chunk = max(1, chunk_values // target.shape.of(None).n_vocab)  # positions

    @property
    def model(self) -> nn.Module:
        return self.target.module()

    def run(self, batch: TokenBatch) -> Float[Tensor, "batch pos d_model"]:
        return self.target.final(batch.tokens)

    def real(self, batch: TokenBatch) -> Bool[Tensor, "batch pos"] | None:
        return batch.mask

    @torch.no_grad()
    def reference(self, clean: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "position _"]:
        """Log-probabilities of all positions if they fit, else what the head reads."""
        rows = clean.flatten(0, 1)
        return self._log_p(rows) if len(rows) <= self.chunk else rows

    def divergence(
        self, reference: Float[Tensor, "position _"], masked: Float[Tensor, "batch pos d_model"], batch: TokenBatch
    ) -> Float[Tensor, ""]:
        rows, real = masked.flatten(0, 1), batch.mask.flatten()
        weights = real.float() / real.sum()
        value = _Divergence.apply(rows, reference, weights, self)
        assert isinstance(value, Tensor)
        return value

    def kl(
        self,
        rows: Float[Tensor, "position d_model"],
        reference: Float[Tensor, "position _"],
        weights: Float[Tensor, " position"],
        known: bool,
    ) -> Float[Tensor, ""]:
        """sum of weights * KL; known: `reference` are log-probabilities."""
        with torch.no_grad():
            log_p = reference if known else self._log_p(reference)
        each = F.kl_div(self._log_p(rows), log_p, reduction="none", log_target=True).sum(-1)
        return (weights * each).sum()

    def _log_p(self, rows: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocab"]:
        return self.target.head(rows).float().log_softmax(-1)


class _Divergence(torch.autograd.Function):
    """Makes the gradient with the value, so that logits are made once and live as long as their chunk."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, reference: Tensor, weights: Tensor, language: LanguageModel
    ) -> Float[Tensor, ""]:
        wanted, known, values = ctx.needs_input_grad[0], len(rows) <= language.chunk, []
        gradient = torch.empty_like(rows) if wanted else None
        for start in range(0, len(rows), language.chunk):
            part = slice(start, start + language.chunk)
            own = rows[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = language.kl(own, reference[part], weights[part], known)
            if gradient is not None:
                gradient[part] = torch.autograd.grad(value, own)[0]
            values.append(value.detach())
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return deltas[0] * gradient, None, None, None


class Vectors:
    """A model from vectors to vectors; a batch is its input [sample, d]."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        return self._model

    def run(self, batch: Float[Tensor, "sample d_in"]) -> Float[Tensor, "sample d_out"]:
        return self._model(batch)

    def real(self, batch: Float[Tensor, "sample d_in"]) -> None:
        return None

    def reference(self, clean: Float[Tensor, "sample d_out"]) -> Float[Tensor, "sample d_out"]:
        return clean

    def divergence(
        self,
        reference: Float[Tensor, "sample d_out"],
        masked: Float[Tensor, "sample d_out"],
        batch: Float[Tensor, "sample d_in"],
    ) -> Float[Tensor, ""]:
        return (masked - reference).square().mean()


class CountedVectors:
    """As `Vectors`, where rows stand for many equal ones. That is exact for rows of which the model makes the same whatever
    stands in for its maps: masks are drawn once for all rows that one row stands for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        return self._model

    def run(self, batch: CountedRows) -> Float[Tensor, "sample d_out"]:
        return self._model(batch.x)

    def real(self, batch: CountedRows) -> Float[Tensor, " sample"]:
        return batch.count

    def reference(self, clean: Float[Tensor, "sample d_out"]) -> Float[Tensor, "sample d_out"]:
        return clean

    def divergence(
        self,
        reference: Float[Tensor, "sample d_out"],
        masked: Float[Tensor, "sample d_out"],
        batch: CountedRows,
    ) -> Float[Tensor, ""]:
        return batch.count @ (masked - reference).square().mean(1) / batch.count.sum()
