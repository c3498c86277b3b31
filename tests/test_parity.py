"""Step by step, other libraries and this one make the same dictionaries of the same rows from the same weights.

Needs the extra `bench`, in an environment as experiments/exp_025_parity_with_peers/README.md makes it; skipped without.
"""

import importlib.util
from typing import Any

import pytest
import torch
from decomposition_parts import objective, planted
from torch import Tensor

from nndecomp.config.schema import (
    Activation,
    Architecture,
    CodeNormalisation,
    Dead,
    Decoder,
    InitialBias,
    Penalty,
    Reconstruction,
    TrainingConfig,
)
from nndecomp.errors import SettingError
from nndecomp.evaluation import peers
from nndecomp.evaluation.peers_dictionary_learning import DictionaryLearning
from nndecomp.evaluation.peers_sae_lens import SaeLens
from nndecomp.evaluation.peers_sparsify import Sparsify
from nndecomp.report import parity
from nndecomp.training.loop import Trainee
from nndecomp.types import Layout

missing = [name for name in peers.LIBRARIES if importlib.util.find_spec(name.replace("-", "_")) is None]
needs_peers = pytest.mark.skipif(bool(missing), reason=f"the extra bench is not installed: {', '.join(missing)}")
N_STEPS, BATCH = 10, 256
SAE = {
    "architecture": Architecture.sae,
    "reads": ["L1.mlp_out"],
    "writes": ["L1.mlp_out"],
    "centre_input": True,
    "reconstruction": Reconstruction.sum_of_squares,
    "dead": Dead.none,
    "n_features": 64,
}
PREFIXES = [0.25, 0.25, 0.5]
WITHOUT_K = {"k": None, "initial_bias": InitialBias.zero, "penalty_warmup": 0.3}
JUMPRELU = WITHOUT_K | {"activation": Activation.jumprelu, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 0.5}
GATED = WITHOUT_K | {"activation": Activation.gated, "penalty": Penalty.l1, "penalty_coefficient": 0.1}
BY_NORM = {"initial_bias": InitialBias.zero, "code_normalisation": CodeNormalisation.sae}
UNIT = {"decoder": Decoder.unit_norm, "initial_bias": InitialBias.geometric_median}
NO_MOMENTUM = {"betas": [0.0, 0.999]}
CASES: dict[str, tuple[type[peers.Peer], dict[str, Any], str | None]] = {
    "sae-lens topk": (SaeLens, BY_NORM, None),
    "sae-lens batchtopk": (SaeLens, BY_NORM | {"activation": Activation.batchtopk}, None),
    "sae-lens matryoshka": (
        SaeLens,
        BY_NORM | {"activation": Activation.batchtopk, "matryoshka": PREFIXES, "matryoshka_weights": [1.0] * 3},
        None,
    ),
    "sae-lens jumprelu": (SaeLens, JUMPRELU | {"penalty": Penalty.l0, "penalty_coefficient": 0.1}, None),
    "sae-lens gated": (
        SaeLens,
        GATED | {"penalty_normalisation": CodeNormalisation.sae, "gate_trains_decoder": True},
        None,
    ),
    "dictionary-learning topk": (DictionaryLearning, UNIT, None),
    "dictionary-learning batchtopk": (DictionaryLearning, UNIT | {"activation": Activation.batchtopk}, None),
    "dictionary-learning matryoshka": (
        DictionaryLearning,
        UNIT | {"activation": Activation.batchtopk, "matryoshka": PREFIXES},
        None,
    ),
    "dictionary-learning jumprelu": (
        DictionaryLearning,
        UNIT
        | JUMPRELU
        | NO_MOMENTUM
        | {"centre_input": False, "penalty": Penalty.l0_target, "penalty_coefficient": 5.0, "penalty_target": 4.0},
        "count_before_the_jump",
    ),
    "dictionary-learning gated": (DictionaryLearning, UNIT | GATED | NO_MOMENTUM, None),
}


def batch(layout: Layout, seed: int) -> Tensor:
    """Noise makes ties, where libraries may choose differently, unlikely."""
    draw = torch.Generator().manual_seed(seed)
    return planted(layout, BATCH, seed=seed) + 0.3 * torch.randn(BATCH, layout.width, generator=draw)


@needs_peers
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("case", CASES)
def test_after_ten_steps_all_weights_are_the_same(case: str):
    library, settings, repair = CASES[case]
    ours = objective(**SAE | settings)
    clip = None if case == "dictionary-learning gated" else 1.0
    cfg = TrainingConfig(
        n_tokens=N_STEPS * BATCH, batch_tokens=BATCH, lr=3e-3, lr_warmup=0.0, lr_decay=0.5, clip_norm=clip
    )
    ours.start(batch(ours.layout, 0))
    theirs = library(ours.dictionary, ours.cfg, cfg)  # pyright: ignore[reportCallIssue]
    if repair is not None:
        getattr(theirs, repair)()
    trainee = Trainee("ours", ours, cfg)
    for step in range(N_STEPS):
        rows = batch(ours.layout, step)
        theirs.step(rows, step)
        trainee.step(rows, step)
    bank = ours.dictionary.banks[0]
    for name, own in (("W_enc", bank.W_enc), ("W_dec", bank.W_dec), ("b_dec", ours.dictionary.b_dec)):
        torch.testing.assert_close(theirs.weights()[name], own.detach(), rtol=0, atol=2e-4)


@pytest.mark.skipif(importlib.util.find_spec("sparsify") is None, reason="the extra bench is not installed: sparsify")
@pytest.mark.filterwarnings("ignore")  # of the library
def test_after_ten_steps_sparsify_has_the_same_weights():
    ours = objective(**SAE | UNIT | {"reconstruction": Reconstruction.normalised})
    cfg = TrainingConfig(
        n_tokens=N_STEPS * BATCH, batch_tokens=BATCH, lr=3e-3, lr_warmup=0.0, lr_decay=1.0, clip_norm=None
    )
    ours.start(batch(ours.layout, 0))
    theirs, trainee = Sparsify(ours.dictionary, ours.cfg, cfg), Trainee("ours", ours, cfg)
    for step in range(N_STEPS):
        theirs.step(batch(ours.layout, step), step)
        trainee.step(batch(ours.layout, step), step)
    theirs.sae.set_decoder_norm_to_unit_norm()  # before a step there, after one here
    bank = ours.dictionary.banks[0]
    for name, own in (("W_enc", bank.W_enc), ("W_dec", bank.W_dec), ("b_dec", ours.dictionary.b_dec)):
        torch.testing.assert_close(theirs.weights()[name], own.detach(), rtol=0, atol=2e-4)


def test_without_the_libraries_it_is_said_in_one_sentence_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "LIBRARIES", ("sae-lens", "a-library-of-nobody"))
    with pytest.raises(
        SettingError, match="a-library-of-nobody cannot be imported: .* needs the extra `bench`"
    ) as refused:
        peers.check_installed()
    assert "\n" not in str(refused.value)


def test_a_fit_is_summed_over_all_rows():
    class Halves:
        """Reconstructs a half of everything by one feature, another is active on every second row, a third on none."""

        def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
            codes = torch.zeros(len(rows), 3)
            codes[:, 0], codes[::2, 1] = 1.0, 2.0
            return rows / 2, codes

    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(10, 1)
    assert peers.fit(Halves(), rows, batch=4) == peers.Fit(fvu=0.25, l0=1.5, dead=1 / 3)


def test_the_table_sets_differences_beside_what_seeds_alone_make():
    fits = [
        {
            **{"method": "topk", "library": "sae-lens", "repair": None, "seed": seed},
            "theirs": {"fvu": 0.1 * (seed + 1), "l0": 4.0, "dead": 0.5, "ms": 3.0},
            "ours": {"fvu": 0.1 * (seed + 1) + 0.05, "l0": 3.5, "dead": 0.0, "ms": 2.0},
        }
        for seed in (0, 1)
    ]
    lines = parity.table(fits, {"sae-lens": "6"}).splitlines()
    assert lines[2] == (
        "| topk | sae-lens | 0.1500 | 0.2000 | +0.0500 | 0.0707 | 4.00 | 3.50 | -0.50 | 0.00 | 50.0% | 0.0% | 3.0 | 2.0 |"
    )
    assert parity.scores(fits)["topk/sae-lens/theirs_fvu"] == pytest.approx(0.15)
    assert [len(panel.collections) for panel in parity.figure(fits).axes] == [2, 2]
