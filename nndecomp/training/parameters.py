"""Training a parameter decomposition.

    loss = faithfulness coefficient * faithfulness + minimality coefficient * minimality + sum of the reconstruction losses

One step: the undisturbed run, whose maps' inputs make the importances g; then for each reconstruction loss as many runs of the
model with masked components as it asks for. Importances are of the undisturbed run in all of them, while components read what
arrives. Gradients reach V and U through masked components, through what they leave over, and, where importances see what
components read, through those. Bushnaq, Braun and Sharkey 2025, arXiv 2506.20790, section 2; adversaries as in their later code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.checks import require
from nndecomp.config.schema import TrainingConfig
from nndecomp.config.spd import (
    ImportanceKind,
    Masks,
    Reconstructed,
    ReconstructionConfig,
    SPDConfig,
)
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.adversary import PersistentSources, attacked, damaging, leading
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.losses import faithfulness, minimality, minimality_at, p_at
from nndecomp.decompositions.spd.masks import Gates, Masking, Routes
from nndecomp.training.progress import Progress
from nndecomp.training.subjects import Subject


@dataclass(frozen=True)
class _Step:
    """What one batch's losses share."""

    batch: Any
    gates: Gates
    reference: Tensor
    reads: dict[str, Tensor | None]  # of the components, undisturbed, in the order in which maps run; null: not known
    outputs: dict[str, Tensor] | None  # of the maps, undisturbed; null where no loss compares them


class SPDObjective(nn.Module):
    """rows: (sequences, positions) of a batch, or (samples,): persistent sources have one entry for some or all of them."""

    def __init__(
        self, decomposition: ParameterDecomposition, subject: Subject, cfg: SPDConfig, rows: Sequence[int]
    ) -> None:
        super().__init__()
        trained = [name for name, parameter in subject.model.named_parameters() if parameter.requires_grad]
        assert not trained, f"{', '.join(trained)} would be trained with the components: freeze the model"
        assert not subject.model.training, "the model under study is in training mode"
        _check(cfg, rows)
        self.decomposition, self.cfg = decomposition, cfg
        self._subject = subject
        device = next(decomposition.parameters()).device
        sizes = {each.name: C for each, C in decomposition.sizes.items()}
        self.adversaries = nn.ModuleDict(
            {
                name: PersistentSources(sizes, rows, each, device)
                for name, each in cfg.losses.items()
                if each.masks is Masks.persistent_pgd
            }
        )
        self._matrices = [each.matrix() for each in decomposition.sizes]
        # Sources that the loss is a function of, until after_step, and the learning rate of their step.
        self._pending: dict[str, tuple[dict[str, Tensor], float]] = {}

    @property
    def subject(self) -> Subject:
        return self._subject

    def loss(self, batch: Any, progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and of what it is made: unweighted losses by name, and `l0/<map>`, active components a position."""
        inputs: dict[str, Tensor] = {}
        # Kept only where they are compared.
        hidden = any(each.reconstructed is Reconstructed.hidden for each in self.cfg.losses.values())
        outputs: dict[str, Tensor] | None = {} if hidden else None
        with torch.no_grad(), self.decomposition.recording(inputs, outputs):
            clean = self._subject.run(batch)
        importances = self.decomposition.importances(inputs)
        gates = {name: masks.gate(each.q, self.cfg.sampling) for name, each in importances.items()}
        reads = {name: importances[name].a for name in inputs}
        step = _Step(batch, gates, self._subject.reference(clean), reads, outputs)
        real = self._subject.real(batch)

        with torch.autocast(next(iter(inputs.values())).device.type, enabled=False):
            faith = faithfulness(self._matrices, list(self.decomposition.components.values()))
            upper = {name: each.h for name, each in importances.items()}
            minimal = minimality(upper, real, p_at(progress, self.cfg), self.cfg.frequency)
        losses = {name: self._reconstruction(name, each, step, progress) for name, each in self.cfg.losses.items()}
        total = self.cfg.faithfulness * faith + minimality_at(progress, self.cfg) * minimal
        for name, each in losses.items():
            total = total + self.cfg.losses[name].coefficient * each
        with torch.no_grad():
            terms = {"loss": total, "faithfulness": faith, "minimality": minimal, **losses}
            l0 = {f"l0/{name}": _active(each.q, real) for name, each in importances.items()}
        return total, {name: value.detach() for name, value in (terms | l0).items()}

    def _reconstruction(self, name: str, cfg: ReconstructionConfig, step: _Step, progress: float) -> Tensor:
        if cfg.masks is Masks.persistent_pgd:
            (routes,) = masks.routes_of(step.gates, cfg)
            return self._persistent(name, cfg, step, routes, progress)
        n_samples = cfg.n_samples if cfg.masks is Masks.stochastic else 1
        runs = [routes for _ in range(n_samples) for routes in masks.routes_of(step.gates, cfg)]
        return torch.stack([self._run(cfg, step, self._masking(cfg, step, routes)) for routes in runs]).mean()

    def _masking(self, cfg: ReconstructionConfig, step: _Step, routes: Routes) -> Masking:
        match cfg.masks:
            case Masks.stochastic:
                return masks.stochastic(step.gates, routes, self.cfg.sampling, self.cfg.delta)
            case Masks.importance:
                return masks.important(step.gates, routes)
            case Masks.ones:
                return masks.ones(step.gates, routes)
            case Masks.pgd:
                damage = partial(self._run, cfg, step)
                return attacked(damage, step.gates, routes, cfg, self.cfg.delta)
            case Masks.persistent_pgd:
                raise AssertionError("sources that persist are updated beside the loss")

    def _damage(
        self, cfg: ReconstructionConfig, step: _Step, routes: Routes, gates: Gates, s: Mapping[str, Tensor]
    ) -> Tensor:
        return self._run(cfg, step, damaging(gates, routes, s, self.cfg.delta))

    def _persistent(self, name: str, cfg: ReconstructionConfig, step: _Step, routes: Routes, progress: float) -> Tensor:
        adversary = self.adversaries[name]
        assert isinstance(adversary, PersistentSources), f"{name} has a {type(adversary).__name__}"
        warm = cfg.source_lr_warmup
        lr = cfg.source_lr * (min(1.0, progress / warm) if warm else 1.0)

        damage = partial(self._damage, cfg, step, routes)
        if not self.training:
            return damage(step.gates, adversary.values(adversary.raw()))
        fixed = {key: g.detach() for key, g in step.gates.items()}
        adversary.ascend(lambda s: damage(fixed, s), lr)
        # Leaves of their own, so that the step's one backward pass brings the gradient of this loss and no other's.
        raw = {key: s.clone().requires_grad_() for key, s in adversary.raw().items()}
        self._pending[name] = (raw, lr)
        return damage(step.gates, adversary.values(raw))

    def _run(self, cfg: ReconstructionConfig, step: _Step, masking: Masking) -> Tensor:
        """One run of the model with masked components, and how far it is from the undisturbed one.

        The first map to run that has components takes in what it does undisturbed: what they read of it is not read again.
        """
        outputs: dict[str, Tensor] = {}
        first = next(name for name in step.reads if name in masking)
        known = step.reads[first]
        with self.decomposition.installed(masking, outputs, {} if known is None else {first: known}):
            masked = self._subject.run(step.batch)
        match cfg.reconstructed:
            case Reconstructed.outputs:
                return self._subject.divergence(step.reference, masked, step.batch)
            case Reconstructed.hidden:
                assert step.outputs is not None
                return _hidden_error(outputs, step.outputs, self._subject.real(step.batch))

    def before_step(self) -> None:
        pass

    def clipped_apart(self) -> list[tuple[list[nn.Parameter], float]]:
        """V and U; gradients of the importances stay as they are."""
        limit = self.cfg.clip_components
        return [] if limit is None else [(list(self.decomposition.banks.parameters()), limit)]

    @torch.no_grad()
    def after_step(self) -> None:
        for name, (raw, lr) in self._pending.items():
            adversary, coefficient = self.adversaries[name], self.cfg.losses[name].coefficient
            assert isinstance(adversary, PersistentSources)
            adversary.update({key: _gradient(s) / coefficient for key, s in raw.items()}, lr)
        self._pending.clear()

    def take_resets(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return cfg

    def lr_shares(self) -> dict[str, float]:
        return {}

    def start(self, description: str) -> float:
        """Fits V U to the maps before training, with an optimiser that is then forgotten; returns the faithfulness reached."""
        own = list(self.decomposition.banks.parameters())
        cfg = self.cfg
        optimiser = torch.optim.AdamW(own, lr=cfg.warmup_lr, weight_decay=cfg.warmup_weight_decay, fused=True)
        components = list(self.decomposition.components.values())
        if cfg.warmup_steps:
            with Progress(f"{description}: faithfulness", cfg.warmup_steps, 0, unit="steps") as progress:
                for _ in range(cfg.warmup_steps):
                    optimiser.zero_grad()
                    faithfulness(self._matrices, components).backward()
                    optimiser.step()
                    progress.advance(1)
            optimiser.zero_grad()
        with torch.no_grad():
            return float(faithfulness(self._matrices, components))

    def finished(self) -> ParameterDecomposition:
        """As it is now, in eval mode where it is looked at."""
        return self.decomposition


def _check(cfg: SPDConfig, rows: Sequence[int]) -> None:
    require(
        len(rows) == 2 or cfg.importance.kind is not ImportanceKind.global_shared_transformer,
        "spd.importance.kind=global_shared_transformer looks along a text, and inputs are vectors; write global_shared_mlp",
    )
    for each in cfg.losses.values():
        if each.adversarial:
            leading(each.source_scope, rows, each.source_repeats)


def _gradient(s: Tensor) -> Tensor:
    assert s.grad is not None, "sources are updated after the loss that they were part of has been differentiated"
    return s.grad


def _active(q: Float[Tensor, "*rows C"], real: Tensor | None) -> Float[Tensor, ""]:
    """Mean over positions of the number of components with g > 0, which is q > 0."""
    counts = (q > 0).sum(-1).float()
    return counts.mean() if real is None else (counts * real).sum() / real.sum()


def _hidden_error(masked: Mapping[str, Tensor], clean: Mapping[str, Tensor], real: Tensor | None) -> Float[Tensor, ""]:
    """Mean over positions and coordinates, then over maps, of the squared error of what the maps return."""
    means = []
    for name, y_hat in masked.items():
        errors = (y_hat.float() - clean[name].float()).square().mean(-1)
        means.append(errors.mean() if real is None else (errors * real).sum() / real.sum())
    return torch.stack(means).mean()
