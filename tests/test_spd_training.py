"""Training a parameter decomposition through the loop: it learns, and a run that is killed ends as one that never was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from spd_parts import chain, loss_term, objective_on_text, objective_on_vectors, small_language_model
from tiny_models import N_VOCAB
from torch import Tensor
from torch.testing import assert_close
from training_parts import QUIET

from nndecomp.config.checks import DType
from nndecomp.config.schema import LrSchedule, TrainingConfig
from nndecomp.config.spd import (
    ImportanceConfig,
    ImportanceKind,
    Masks,
    ReconstructionConfig,
    Routing,
    SourceScope,
)
from nndecomp.errors import SettingError
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.log import Log
from nndecomp.training.loop import Trainee, train
from nndecomp.training.parameters import SPDObjective

N_SEQS, N_POS, N_STEPS = 4, 6, 12
SUBSET = loss_term(Masks.stochastic, routing=Routing.subset)
PGD = loss_term(Masks.pgd, routing=Routing.subset, n_steps=2, step_size=0.5)
PERSISTENT = loss_term(Masks.persistent_pgd, n_steps=1, source_scope=SourceScope.repeated, source_repeats=2)


class Killed(Exception):
    pass


class Texts:
    """Batch n is drawn from seed n; dies after so many."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.n, self.dies_at = 0, dies_at

    def next_batch(self) -> TokenBatch:
        if self.n == self.dies_at:
            raise Killed
        self.n += 1
        tokens = torch.randint(1, N_VOCAB, (N_SEQS, N_POS), generator=torch.Generator().manual_seed(self.n))
        return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool))

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def training(n_steps: int = N_STEPS, **changes: Any) -> TrainingConfig:
    values = {"lr": 3e-3, "lr_schedule": LrSchedule.constant, "lr_warmup": 0.0, "lr_decay": 0.0, "log_every": 4}
    tokens = N_SEQS * N_POS
    return TrainingConfig(
        n_tokens=n_steps * tokens, batch_tokens=tokens, **{**values, "checkpoint_every": 3, **changes}
    )


def made(losses: Mapping[str, ReconstructionConfig], **changes: Any) -> SPDObjective:
    torch.manual_seed(0)
    return objective_on_text(small_language_model(), dict(losses), **{"p_end": 0.4, "frequency": 0.1, **changes})


def attempt(
    objective: SPDObjective, cfg: TrainingConfig, out: Path, dies_at: int | None = None, look: bool = False
) -> Any:
    def evaluate(step: int) -> dict[str, float]:
        return {name: float(value) for name, value in objective.loss(Texts().next_batch(), 0.5)[1].items()}

    with Log(out, QUIET) as log:
        train(
            {"a": objective}, Texts(dies_at), cfg, out, log=log, evaluate=evaluate if look else None, description="spd"
        )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", [SUBSET, PGD, PERSISTENT], ids=lambda each: each.masks.value)
def test_training_lowers_each_kind_of_loss_and_leaves_the_target_alone(loss: ReconstructionConfig, tmp_path: Path):
    objective = made({"r": loss}, minimality=1e-5, faithfulness=100.0)
    before = {name: value.clone() for name, value in objective.subject.model.state_dict().items()}
    rows = attempt(objective, training(40, lr=1e-2), tmp_path)
    assert rows[-1]["r"] < 0.7 * rows[0]["r"] and rows[-1]["faithfulness"] < 0.7 * rows[0]["faithfulness"]
    after = objective.subject.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in objective.subject.model.parameters())
    assert not any(module._forward_hooks for module in objective.subject.model.modules())


def test_minimality_switches_components_off(tmp_path: Path):
    objective = made({"r": SUBSET}, minimality=0.3, p_start=1.0, p_end=None, frequency=0.0)
    rows = attempt(objective, training(40, lr=1e-2), tmp_path)
    l0 = [sum(value for name, value in row.items() if name.startswith("l0/")) for row in (rows[0], rows[-1])]
    assert l0[1] < 0.3 * l0[0]


RESUMED: dict[str, dict[str, Any]] = {
    "stochastic and pgd": {"losses": {"a": SUBSET, "b": PGD}},
    "persistent": {"losses": {"a": PERSISTENT, "b": loss_term(Masks.persistent_pgd, source_sigmoid=True)}},
    "scalar importances, layerwise": {
        "losses": {"a": loss_term(Masks.stochastic, routing=Routing.layerwise)},
        "importance": ImportanceConfig(kind=ImportanceKind.mlp, hidden=[3]),
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_started_again_bit_for_bit(name: str, tmp_path: Path):
    cfg = training()
    whole, parts = made(**RESUMED[name]), made(**RESUMED[name])
    rows = attempt(whole, cfg, tmp_path / "whole")
    for dies_at in (4, 8):
        with pytest.raises(Killed):
            attempt(made(**RESUMED[name]), cfg, tmp_path / "parts", dies_at)
    again = attempt(parts, cfg, tmp_path / "parts")
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row | {"timing": None} for row in rows] == [row | {"timing": None} for row in again]
    fresh = made(**RESUMED[name]).state_dict()
    assert not any(torch.equal(ours[key], fresh[key]) for key in ours if "banks" in key or "source" in key)


def test_looking_on_the_way_changes_nothing(tmp_path: Path):
    """Carried sources too are as if nobody had looked."""
    losses = RESUMED["persistent"]["losses"]
    alone, looked = made(losses), made(losses)
    attempt(alone, training(), tmp_path / "alone")
    attempt(looked, training(evaluate_every=3), tmp_path / "looked", look=True)
    assert all(torch.equal(value, looked.state_dict()[key]) for key, value in alone.state_dict().items())


def test_bfloat16_is_for_runs_of_the_model_while_weights_leftovers_and_penalties_stay_float32():
    """The faults: faithfulness or powers in bfloat16; gradients or parameters that come back in it."""
    batch, losses = Texts().next_batch(), {"r": SUBSET, "p": PGD, "s": PERSISTENT}
    terms = {}
    for dtype in (DType.float32, DType.bfloat16):
        objective = made(losses)
        cfg = training(autocast=dtype)
        trainee = Trainee("a", objective, cfg)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is DType.bfloat16):
            _, terms[dtype] = objective.loss(batch, 0.0)
        trainee.step(batch, 0)
        for name, p in objective.named_parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
        assert all(s.dtype == torch.float32 for s in objective.buffers())
    exact, rough = terms[DType.float32], terms[DType.bfloat16]
    assert torch.equal(exact["faithfulness"], rough["faithfulness"])
    assert exact["r"] != rough["r"]
    assert_close(rough["r"], exact["r"], rtol=0.1, atol=0)
    assert_close(rough["minimality"], exact["minimality"], rtol=0.05, atol=0)


def test_the_gradient_of_components_is_clipped_and_that_of_importances_is_not():
    """The fault: one norm over all, by which importances hardly learn. What is logged is the norm before clipping."""
    clipped, free = made({"r": SUBSET}, clip_components=0.01), made({"r": SUBSET}, clip_components=None)
    logged = []
    for objective in (clipped, free):
        torch.manual_seed(1)
        trainee = Trainee("spd", objective, training(1, clip_norm=None))
        trainee.step(Texts().next_batch(), 0)
        logged.append(trainee.window.means(1)["gradient_norm"])
    assert logged[0] == logged[1] > 0.02

    def norm(gradients: list[Tensor | None]) -> float:
        return float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())

    components = [[p.grad for p in each.decomposition.banks.parameters()] for each in (clipped, free)]
    importances = [[p.grad for p in each.decomposition.importance.parameters()] for each in (clipped, free)]
    assert norm(components[0]) == pytest.approx(0.01, rel=1e-4) and norm(components[1]) > 0.02
    assert_close(importances[0], importances[1], atol=0, rtol=0)
    ratio = norm(components[0]) / norm(components[1])
    assert_close(components[0], [None if g is None else g * ratio for g in components[1]])


# --- before training ---


def test_the_warm_up_fits_the_weights_and_touches_nothing_else():
    """The fault: one optimiser for both, whose moments of the warm-up then steer training."""
    objective = made(
        {"r": SUBSET}, maps={"h.*.mlp.c_fc": 20, "h.*.mlp.down_proj": 20}, warmup_steps=200, warmup_lr=1e-2
    )
    importances = [p.clone() for p in objective.decomposition.importance.parameters()]
    before = float(objective.loss(Texts().next_batch(), 0.0)[1]["faithfulness"])
    reached = objective.start("spd")
    assert reached < 1e-3 * before
    assert reached == pytest.approx(float(objective.loss(Texts().next_batch(), 0.0)[1]["faithfulness"]), rel=1e-4)
    assert all(map(torch.equal, importances, objective.decomposition.importance.parameters()))
    assert all(p.grad is None for p in objective.parameters())


def test_no_warm_up_changes_nothing():
    objective, untouched = made({"r": SUBSET}, warmup_steps=0), made({"r": SUBSET})
    faithfulness = objective.start("spd")
    assert all(map(torch.equal, objective.parameters(), untouched.parameters()))
    assert faithfulness == pytest.approx(float(objective.loss(Texts().next_batch(), 0.0)[1]["faithfulness"]))


def test_a_target_that_would_learn_or_drop_out_is_refused():
    """Every parameter of it is frozen, of maps that are decomposed and of all others."""
    model = chain(4, 6, 3)
    model[2].requires_grad_(True)
    with pytest.raises(AssertionError, match="2.weight, 2.bias would be trained"):
        objective_on_vectors(model, {"r": SUBSET}, maps={"0": 5})
    model = chain(4, 6, 3).train()
    with pytest.raises(AssertionError, match="training mode"):
        objective_on_vectors(model, {"r": SUBSET})


def test_a_transformer_over_positions_is_refused_for_vectors():
    importance = ImportanceConfig(kind=ImportanceKind.global_shared_transformer)
    with pytest.raises(SettingError, match="spd.importance.kind=global_shared_transformer looks along a text"):
        objective_on_vectors(chain(4, 6, 3), {"r": SUBSET}, importance=importance)


def test_a_map_that_runs_after_what_is_compared_is_refused():
    """The LM head runs in the divergence, where nothing stands in for it."""
    objective = made({"r": SUBSET}, maps={"h.*.mlp.c_fc": 5, "lm_head": 5})
    with pytest.raises(SettingError, match="spd.maps names lm_head, which the model does not run before its LM head"):
        objective.loss(Texts().next_batch(), 0.0)
