"""The adversary: sources s in [0, 1] for which masks m = g + (1 - g) s do the most damage that importances g allow.

    pgd               s <- clamp(s + step_size sign(dL/ds), 0, 1), n_steps times from a fresh start on each batch
    persistent_pgd    s lives across steps: n_steps of ascent on the batch, and one more, by the gradient of the very loss that
                      trains, made after the training step

Gradients are taken with respect to s alone; routing is drawn once and kept. Of each map s has C + 1 entries, the last for
what the components leave over.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.checks import require
from nndecomp.config.spd import AscentConfig, ReconstructionConfig, SourceOptimizer, SourceScope, SourceStart
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.masks import Gates, Masking, Routes

Sources = dict[str, Float[Tensor, "*source C1"]]
LossOf = Callable[[Mapping[str, Tensor]], Tensor]
_ADAM_EPSILON = 1e-8


def leading(scope: SourceScope, rows: Sequence[int], repeats: int) -> tuple[int, ...]:
    """The shape of sources before their entries, for inputs of `rows` = (sequence, position) or (sample,)."""
    match scope:
        case SourceScope.single:
            return (1,) * len(rows)
        case SourceScope.across_batch:
            return (1, *rows[1:])
        case SourceScope.repeated:
            require(
                rows[0] % repeats == 0,
                f"spd.losses.*.source_repeats={repeats} must divide the {rows[0]} sequences of a batch",
            )
            return (repeats, *rows[1:])
        case SourceScope.each:
            return tuple(rows)


def spread(s: Float[Tensor, "*source C1"], n: int) -> Float[Tensor, "*rows C1"]:
    """Sources of some sequences, in turn for n of them."""
    return s if len(s) in (1, n) else s.repeat(n // len(s), *(1,) * (s.ndim - 1))


def started(shape: Sequence[int], cfg: AscentConfig, device: torch.device) -> Tensor:
    match cfg.source_start:
        case SourceStart.random:
            return torch.rand(*shape, device=device)
        case SourceStart.ones:
            return torch.ones(*shape, device=device)
        case SourceStart.zeros:
            return torch.zeros(*shape, device=device)


def pgd(loss_of: LossOf, sources: Sources, n_steps: int, step_size: float) -> Sources:
    """The sources after n_steps of projected ascent by the gradient's sign; they carry no gradient."""
    return shared_pgd(lambda: [(1.0, loss_of)], sources, n_steps, step_size)


def shared_pgd(
    losses: Callable[[], Iterable[tuple[float, LossOf]]], sources: Sources, n_steps: int, step_size: float
) -> Sources:
    """As `pgd`, on a loss that is a weighted sum over batches: one at a time, all of them before each step."""
    for _ in range(n_steps):
        gradients = {name: torch.zeros_like(s) for name, s in sources.items()}
        for weight, loss_of in losses():
            for name, each in _gradients(loss_of, sources).items():
                gradients[name] += weight * each
        sources = {name: (s + step_size * gradients[name].sign()).clamp(0, 1) for name, s in sources.items()}
    return sources


def attacked(
    loss_of: Callable[[Masking], Tensor], gates: Gates, routes: Routes, cfg: AscentConfig, delta: bool
) -> dict[str, masks.Mask]:
    """Masks at the sources that ascent on the loss finds from a fresh start, importances held constant meanwhile."""
    fixed = {name: g.detach() for name, g in gates.items() if name in routes}
    sources = beginning(fixed, cfg)
    found = pgd(lambda s: loss_of(damaging(fixed, routes, s, delta)), sources, cfg.n_steps, cfg.step_size)
    return damaging(gates, routes, found, delta)


def beginning(gates: Gates, cfg: AscentConfig) -> Sources:
    """Where ascent starts, for the sequences and positions of these gates."""
    sources = {}
    for name, g in gates.items():
        lead = leading(cfg.source_scope, g.shape[:-1], cfg.source_repeats)
        sources[name] = started((*lead, g.shape[-1] + 1), cfg, g.device)
    return sources


def damaging(gates: Gates, routes: Routes, sources: Mapping[str, Tensor], delta: bool) -> dict[str, masks.Mask]:
    """Masks at these sources, each of some sequences or of all."""
    whole = {name: spread(s, len(gates[name])) for name, s in sources.items()}
    return masks.adversarial(gates, routes, whole, delta)


def _gradients(loss_of: LossOf, sources: Sources) -> Sources:
    leaves = {name: s.detach().requires_grad_() for name, s in sources.items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(leaves), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


class PersistentSources(nn.Module):
    """What one persistent adversary carries, in buffers, so that a run that is resumed goes on with it."""

    def __init__(
        self, sizes: Mapping[str, int], rows: Sequence[int], cfg: ReconstructionConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.cfg, self.names = cfg, list(sizes)
        lead = leading(cfg.source_scope, rows, cfg.source_repeats)
        for i, C in enumerate(sizes.values()):
            s = started((*lead, C + 1), cfg, device)
            if cfg.source_sigmoid:
                s = s.clamp(1e-3, 1 - 1e-3).logit()
            self.register_buffer(f"source_{i}", s)
            self.register_buffer(f"mean_{i}", torch.zeros_like(s))
            self.register_buffer(f"square_{i}", torch.zeros_like(s))
        self.n_updates: Tensor
        self.register_buffer("n_updates", torch.zeros((), device=device))

    def raw(self) -> Sources:
        return {name: self.get_buffer(f"source_{i}") for i, name in enumerate(self.names)}

    def values(self, raw: Mapping[str, Tensor]) -> Sources:
        """s from what is carried."""
        return {name: s.sigmoid() if self.cfg.source_sigmoid else s for name, s in raw.items()}

    def ascend(self, loss_of: LossOf, lr: float) -> None:
        """The steps on the batch before the loss is taken."""
        for _ in range(self.cfg.n_steps):
            self.update(_gradients(lambda raw: loss_of(self.values(raw)), self.raw()), lr)

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step uphill: by the sign, or Adam's (Kingma and Ba 2015, algorithm 1)."""
        beta1, beta2 = self.cfg.source_betas
        self.n_updates += 1
        for i, name in enumerate(self.names):
            s, m, v = (self.get_buffer(f"{kind}_{i}") for kind in ("source", "mean", "square"))
            g = gradients[name].to(s.dtype)
            match self.cfg.source_optimizer:
                case SourceOptimizer.sign:
                    s.add_(g.sign(), alpha=lr)
                case SourceOptimizer.adam:
                    m.lerp_(g, 1 - beta1)
                    v.lerp_(g * g, 1 - beta2)
                    rms = (v / (1 - beta2**self.n_updates)).sqrt_().add_(_ADAM_EPSILON)
                    s.add_(lr * (m / (1 - beta1**self.n_updates)) / rms)
            if not self.cfg.source_sigmoid:
                s.clamp_(0, 1)
