"""Slow and obvious: dictionaries trained by dense products and autograd alone, to measure the fast path against.

    pre = x @ W_enc.T + b_enc;  f = pre where it is active, else 0;  y_hat = b_dec + f @ W_dec        [token, feature] throughout

`DenseDictionary` starts from an objective's own weights and minimises the same loss. `DensePairs` is the training step of a
cross-layer transcoder as it is usually written: one product for every pair of a layer that is read and a layer that is written.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nndecomp.config.schema import Activation, CodeNormalisation, Penalty, SizeConfig, TrainingConfig
from nndecomp.decompositions import losses
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.training.schedules import learning_rate

Dense = Float[Tensor, "token feature"]


def active(pre: Dense, activation: Activation, k: int | None, theta: Tensor | None) -> Bool[Tensor, "token feature"]:
    """By sorting everything: the k largest of a row, the k * tokens largest of the matrix, or what is above a threshold."""
    match activation:
        case Activation.topk:
            assert k is not None
            best = pre.sort(1, descending=True).indices[:, :k]
            return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True) & (pre > 0)
        case Activation.batchtopk:
            assert k is not None
            best = pre.flatten().sort(descending=True).indices[: k * len(pre)]
            chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
            return chosen.index_fill_(0, best, True).view_as(pre) & (pre > 0)
        case Activation.jumprelu:
            assert theta is not None
            return pre > theta
        case other:
            raise AssertionError(f"there is no dense {other.value}")


class DenseDictionary:
    """`reverse`: products sum over coordinates from the last to the first, which changes nothing but rounding: how far two exact
    ways of training drift apart, because an entry that ties with another falls out on one side."""

    def __init__(self, made: DictionaryObjective, training: TrainingConfig, reverse: bool = False) -> None:
        self.reverse = reverse
        cfg, self.made, self.training = made.cfg, made, training
        assert cfg.code_normalisation is CodeNormalisation.none and cfg.penalty in (Penalty.none, Penalty.l0)
        self.cfg, self.k = cfg, cfg.k
        own = lambda p: nn.Parameter(p.detach().clone())  # noqa: E731
        self.W_enc = [own(bank.W_enc) for bank in made.dictionary.banks]
        self.b_enc = [own(bank.b_enc) for bank in made.dictionary.banks]
        self.W_dec = [own(bank.W_dec) for bank in made.dictionary.banks]
        self.b_dec = own(made.dictionary.b_dec)
        jumps = made.dictionary.activation
        self.theta = [own(jumps.theta(g)) for g in range(len(self.W_enc))] if isinstance(jumps, JumpRelu) else []
        self.parameters = [*self.W_enc, *self.b_enc, *self.W_dec, self.b_dec, *self.theta]
        self.adam = torch.optim.Adam(
            self.parameters, lr=training.lr, betas=(training.betas[0], training.betas[1]), foreach=False
        )

    def loss(self, rows: Float[Tensor, "token width"]) -> Float[Tensor, ""]:
        x, y = self.made.split(rows)
        assert isinstance(x, Tensor), "tokens are read one by one"
        y_hat, n_active = self.b_dec.repeat(len(y), 1), torch.zeros(())
        for g, bank in enumerate(self.made.dictionary.banks):
            read = x[:, bank.reads] - (self.b_dec[bank.reads] if self.cfg.centre_input else 0)
            pre = (read.flip(1) @ self.W_enc[g].flip(1).T if self.reverse else read @ self.W_enc[g].T) + self.b_enc[g]
            theta = self.theta[g] if self.theta else None
            on = active(pre.detach(), self.cfg.activation, self.k, theta).float()
            codes = pre * on
            if theta is not None:  # the gradient of thresholds, straight through a rectangle of their bandwidth
                width = self.cfg.jumprelu_bandwidth
                jump = ((pre - theta).abs() < width / 2).float().detach() / width * (theta - theta.detach())
                codes, n_active = codes - theta.detach() * jump, n_active + (on - jump).sum()
            y_hat[:, bank.writes] += codes @ self.W_dec[g]
        fit = losses.reconstruction(y - y_hat, y, self.cfg.reconstruction, self.made.dictionary.write_layout)
        return fit + (self.cfg.penalty_coefficient * n_active / len(y) if self.theta else 0)

    def step(self, rows: Float[Tensor, "token width"], number: int) -> float:
        """As the training loop does it: projection, clipping, Adam, norms."""
        loss = self.loss(rows)
        self.adam.zero_grad()
        loss.backward()
        unit = self.W_dec if self.cfg.unit_norm_decoder else []
        with torch.no_grad():
            for W in unit:
                assert W.grad is not None
                W.grad -= (W.grad * W).sum(1, keepdim=True) * W
            if self.training.clip_norm is not None:
                norm = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm()
                for p in self.parameters:
                    assert p.grad is not None
                    p.grad *= (self.training.clip_norm / norm).clamp(max=1)
            self.adam.param_groups[0]["lr"] = learning_rate(number, self.training)
            self.adam.step()
            for W in unit:
                W /= W.norm(dim=1, keepdim=True)
            for theta in self.theta:
                theta.clamp_(min=0)
        return loss.item()


class DensePairs(nn.Module):
    """Rows are what all layers read, then what all of them are to write, [token, 2 * n_layers * d]."""

    def __init__(self, size: SizeConfig, lr: float) -> None:
        super().__init__()
        L, n, d = size.n_layers, size.n_features, size.d_model
        self.size, self.lr = size, lr
        self.adam: torch.optim.Adam | None = None
        self.W_enc = nn.Parameter(torch.randn(L, d, n) / math.sqrt(d))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(L, n)), nn.Parameter(torch.zeros(L, d))
        self.W_dec = nn.ParameterDict(
            {f"{s}_{t}": nn.Parameter(torch.randn(n, d) / math.sqrt(L * d)) for t in range(L) for s in range(t + 1)}
        )

    def forward(self, x: Float[Tensor, "token layer d"]) -> Float[Tensor, "token layer d"]:
        pre = torch.einsum("tld,ldf->tlf", x, self.W_enc) + self.b_enc
        best = pre.topk(self.size.k, dim=-1)
        f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
        written = []
        for t in range(self.size.n_layers):
            parts = [f[:, s] @ self.W_dec[f"{s}_{t}"] for s in range(t + 1)]
            written.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
        return torch.stack(written, 1) + self.b_dec

    def step(
        self,
        x: Float[Tensor, "token layer d"],
        y: Float[Tensor, "token layer d"],
        autocast: AbstractContextManager[Any] | None = None,
    ) -> Float[Tensor, ""]:
        """Adam is made with the first step: parameters are where they stay."""
        self.adam = torch.optim.Adam(self.parameters(), lr=self.lr) if self.adam is None else self.adam
        with autocast or nullcontext():
            y_hat = self(x)
        loss = (y_hat - y).square().sum(-1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()
