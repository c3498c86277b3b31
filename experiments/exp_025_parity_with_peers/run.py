"""exp_025: do sae-lens, dictionary-learning and this library make equally good dictionaries of the same rows?

    python experiments/exp_025_parity_with_peers/run.py      # in the environment that README.md says how to make

For each method, library and seed: the same rows in the same order, the same first weights, the same settings by meaning;
then one evaluation of all on held-out rows. Killed, it goes on after the last dictionary when started in the same directory.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nndecomp.config.schema import (
    Activation,
    CodeNormalisation,
    Dead,
    Decoder,
    InitialBias,
    Penalty,
    RunConfig,
)
from nndecomp.run import experiment

if TYPE_CHECKING:
    from torch import Tensor

    from nndecomp.targets.base import Target

N_SEEDS = 3
PREFIXES = [0.25, 0.25, 0.5]  # of matryoshka: shares of the features in each block
SAE_LENS: dict[str, Any] = {"decoder": Decoder.free, "dead": Dead.none, "initial_bias": InitialBias.zero}
SAE_LENS_TOPK = SAE_LENS | {"code_normalisation": CodeNormalisation.sae}
DICTIONARY_LEARNING: dict[str, Any] = {"decoder": Decoder.unit_norm, "initial_bias": InitialBias.geometric_median}
WITHOUT_K: dict[str, Any] = {"k": None, "dead": Dead.none, "initial_bias": InitialBias.zero}
JUMPRELU: dict[str, Any] = {"activation": Activation.jumprelu, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 0.5}
BATCHTOPK: dict[str, Any] = {"activation": Activation.batchtopk, "threshold_rate": 0.01}
GATED: dict[str, Any] = {"activation": Activation.gated, "penalty": Penalty.l1}


@dataclass(frozen=True)
class Comparison:
    method: str
    library: str
    settings: dict[str, Any]  # of `decomposition`
    training: dict[str, Any]
    repair: str | None = None  # what of the library is put right, to show that it is why the two differ


def comparisons() -> Iterator[Comparison]:
    topk = {"activation": Activation.topk}
    nested = BATCHTOPK | {"matryoshka": PREFIXES}
    for method, settings, sums in (
        ("topk", topk, {}),
        ("batchtopk", BATCHTOPK, {}),
        ("matryoshka", nested, {"matryoshka_weights": [1.0] * len(PREFIXES)}),
    ):
        yield Comparison(method, "sae-lens", SAE_LENS_TOPK | settings | sums, {})
        yield Comparison(method, "dictionary-learning", DICTIONARY_LEARNING | settings, {})
    l0 = JUMPRELU | WITHOUT_K | {"penalty": Penalty.l0, "penalty_coefficient": 0.5}
    yield Comparison("jumprelu", "sae-lens", SAE_LENS | l0, {})
    target = {"penalty": Penalty.l0_target, "penalty_coefficient": 10.0, "penalty_target": 16.0}
    target |= JUMPRELU | DICTIONARY_LEARNING | WITHOUT_K | {"centre_input": False, "betas": [0.0, 0.999]}
    yield Comparison("jumprelu", "dictionary-learning", target, {})
    yield Comparison("jumprelu", "dictionary-learning", target, {}, "count_before_the_jump")
    normed = {"penalty_coefficient": 2.0, "penalty_normalisation": CodeNormalisation.sae, "gate_trains_decoder": True}
    yield Comparison("gated", "sae-lens", GATED | SAE_LENS | WITHOUT_K | normed, {})
    unit = GATED | DICTIONARY_LEARNING | WITHOUT_K | {"penalty_coefficient": 4.0, "betas": [0.0, 0.999]}
    yield Comparison("gated", "dictionary-learning", unit, {"clip_norm": None})


@experiment("exp_025_parity_with_peers")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp.evaluation import peers  # late: loads torch, which --help does without

    peers.check_installed()
    import torch

    from nndecomp import build, checkpoint
    from nndecomp.activations.harvest import kept
    from nndecomp.decompositions.units import Columns
    from nndecomp.report import parity, style
    from nndecomp.tokens import heldout_tokens

    target = build.target(cfg)
    (site,) = build.decomposed_sites(cfg, target.shape)
    stream = build.stream(cfg, target, [site])
    normalised = Columns(stream.layout, stream.layout, build.scales(cfg, target, [site]))
    rows = normalised(torch.cat([stream.next_batch() for _ in range(cfg.training.n_steps)]))
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    heldout = normalised(target.record(text.tokens, [site])[site][kept(text, cfg.activations)])
    found = []
    for seed in range(cfg.seed, cfg.seed + N_SEEDS):
        for comparison in comparisons():
            file = out / "fits" / f"{comparison.method}_{comparison.library}_{comparison.repair}_{seed}.json"
            if not file.exists():
                checkpoint.write_json(file, compare(cfg, target, comparison, seed, rows, heldout))
            what = {"method": comparison.method, "library": comparison.library, "repair": comparison.repair}
            found.append(what | {"seed": seed} | checkpoint.read_json(file))
    checkpoint.write_json(out / "fits.json", {"versions": peers.versions(), "fits": found})
    style.save(parity.figure(found), out / "figures", "parity")
    table = parity.table(found, peers.versions())
    checkpoint.write_text(out / "table.md", table)
    print(table)
    return parity.scores(found)


def compare(
    cfg: RunConfig, target: "Target", this: Comparison, seed: int, rows: "Tensor", heldout: "Tensor"
) -> dict[str, Any]:
    """Theirs and ours, trained on `rows` in the order of this seed, on the held-out rows."""
    import torch

    from nndecomp.decompositions.architectures import build_dictionary
    from nndecomp.decompositions.objective import DictionaryObjective
    from nndecomp.evaluation import peers
    from nndecomp.evaluation.peers_dictionary_learning import DictionaryLearning
    from nndecomp.evaluation.peers_sae_lens import SaeLens
    from nndecomp.training.loop import Trainee

    settings, training = replace(cfg.decomposition, **this.settings), replace(cfg.training, **this.training)
    batches = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(training.batch_tokens)
    dictionary = build_dictionary(settings, target.shape, seed, target.device, target.name)
    layout = dictionary.write_layout
    ours = DictionaryObjective(dictionary, settings, layout, dict.fromkeys(layout.sites, 1.0))
    ours.start(rows[batches[0]])
    theirs = {"sae-lens": SaeLens, "dictionary-learning": DictionaryLearning}[this.library](
        dictionary, settings, training
    )
    if this.repair is not None:
        getattr(theirs, this.repair)()
    trainee = Trainee("ours", ours, training)
    took = {"theirs": 0.0, "ours": 0.0}
    for step, batch in enumerate(batches):
        for who, each in (("theirs", theirs), ("ours", trainee)):
            started = time.process_time()  # not the wall's: both are alike whatever else the machine does
            each.step(rows[batch], step)
            took[who] += time.process_time() - started
    fits = {"theirs": peers.fit(theirs, heldout), "ours": peers.fit(peers.Own(ours.finished()), heldout)}
    return {who: asdict(fit) | {"ms": 1000 * took[who] / len(batches)} for who, fit in fits.items()}


if __name__ == "__main__":
    main()
