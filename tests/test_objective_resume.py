"""A dictionary's training that is killed and started again ends as one that never was: p, resampled features, archetypes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition_parts import ARCHITECTURES, objective, planted
from torch import Tensor
from training_parts import QUIET

from nndecomp.config.schema import (
    Activation,
    CodeNormalisation,
    Dead,
    Decoder,
    LrSchedule,
    Penalty,
    PreActivationLoss,
    TrainingConfig,
)
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.training.log import Log
from nndecomp.training.loop import train

BATCH, N_STEPS = 64, 24
LP: dict[str, Any] = {
    "activation": Activation.relu,
    "k": None,
    "penalty": Penalty.lp,
    "penalty_coefficient": 0.01,
    "penalty_normalisation": CodeNormalisation.sae,
    "p_anneal": [0.2, 0.9],
    "p_steps": 5,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lp": LP,
    "lp, resampled": LP | {"dead": Dead.resample, "dead_after_tokens": 2 * BATCH, "resample_every": 3 * BATCH},
    "k annealed, resampled, unit norm": {
        "activation": Activation.batchtopk,
        "k": 2,
        "k_start": 8,
        "k_anneal": 0.8,
        "decoder": Decoder.unit_norm,
        "dead": Dead.resample,
        "dead_after_tokens": BATCH,
        "resample_every": 3 * BATCH,
    },
    "ghosts": {"activation": Activation.topk, "k": 1, "dead": Dead.ghost, "dead_after_tokens": BATCH},
    "archetypal matryoshka": {
        "activation": Activation.batchtopk,
        "k": 2,
        "decoder": Decoder.archetypal,
        "archetypes": 20,
        "matryoshka": [0.5, 0.5],
        "dead_after_tokens": BATCH,
    },
    "thresholds": {
        "activation": Activation.jumprelu,
        "k": None,
        "penalty": Penalty.l0_target,
        "penalty_target": 3.0,
        "penalty_coefficient": 0.1,
        "pre_activation_loss": PreActivationLoss.dead,
        "pre_activation_coefficient": 0.01,
        "dead_after_tokens": BATCH,
        "jumprelu_bandwidth": 1.0,
    },
}


class Killed(Exception):
    pass


class Planted:
    """Batches of planted rows; dies after so many."""

    def __init__(self, made: DictionaryObjective, dies_at: int | None) -> None:
        self.layout, self.dies_at, self.n = made.layout, dies_at, 0

    def next_batch(self) -> Tensor:
        if self.n == self.dies_at:
            raise Killed
        self.n += 1
        return planted(self.layout, BATCH, seed=self.n)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def attempt(settings: dict[str, Any], out: Path, dies_at: int | None, look: bool) -> DictionaryObjective:
    torch.manual_seed(0)
    made = objective(**ARCHITECTURES["sae"], **settings)
    cfg = TrainingConfig(
        n_tokens=N_STEPS * BATCH,
        batch_tokens=BATCH,
        lr=1e-2,
        lr_schedule=LrSchedule.constant,
        lr_warmup=0.0,
        lr_decay=0.0,
        log_every=4,
        checkpoint_every=5,
        evaluate_every=3 if look else 0,
    )

    def evaluate(step: int) -> dict[str, float]:
        loss, _ = made.loss(planted(made.layout, BATCH, seed=1000), step / N_STEPS)
        made.finished()
        return {"loss": float(loss)}

    with Log(out, QUIET) as log:
        train(
            {"a": made},
            Planted(made, dies_at),
            cfg,
            out,
            log=log,
            evaluate=evaluate if look else None,
            description="resumable",
        )
    return made


def values(tree: Any) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in values(value))
        else:
            yield name, value


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_and_started_again(name: str, tmp_path: Path):
    settings = SETTINGS[name]
    whole = attempt(settings, tmp_path / "whole", None, look=False)
    for dies_at in (7, 13, 21):
        with pytest.raises(Killed):
            attempt(settings, tmp_path / "parts", dies_at, look=False)
    parts = attempt(settings, tmp_path / "parts", None, look=False)
    ours, theirs = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours), "bit for bit"
    states = [
        torch.load(tmp_path / each / f"checkpoint/step_{N_STEPS}/state.pt", weights_only=True)["trainees"]["a"][
            "optimiser"
        ]
        for each in ("whole", "parts")
    ]
    for a, b in zip(*(values(state["state"]) for state in states), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]), a[0]
    if settings.get("dead") is Dead.resample:
        assert whole._resampled > 2
    if settings.get("penalty") is Penalty.lp:
        assert whole.sparsity._p == pytest.approx(0.2) and float(whole.sparsity.ratio) != 1


@pytest.mark.parametrize("name", SETTINGS)
def test_looking_on_the_way_changes_nothing(name: str, tmp_path: Path):
    """Liveness, thresholds, p, k: dictionary_learning moves its own while it logs and validates."""
    alone = attempt(SETTINGS[name], tmp_path / "alone", None, look=False).state_dict()
    looked = attempt(SETTINGS[name], tmp_path / "looked", None, look=True).state_dict()
    assert all(torch.equal(alone[key], looked[key]) for key in alone)
