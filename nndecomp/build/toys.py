"""Settings -> a trained toy -> its parameter decomposition -> how much of the toy it found."""

from pathlib import Path

from nndecomp.activations.sparse_features import GatheredFeatures, SparseFeatures
from nndecomp.build.settings import device
from nndecomp.build.toy_settings import toy_settings
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.toy_recovery import ToyRecovery, scores, toy_recovery
from nndecomp.targets.maps import find_maps
from nndecomp.targets.toys import ResidMLP, Toy, build_toy
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.state import saved_steps
from nndecomp.training.subjects import CountedVectors, Vectors
from nndecomp.training.toys import ToyObjective


def trained_toy(cfg: RunConfig, out: Path) -> Toy:
    """Frozen, in as few coordinates as it takes; goes on from a checkpoint in `out`."""
    own, _ = toy_settings(cfg)
    toy = build_toy(own, cfg.seed).to(device(cfg))
    rows = SparseFeatures(own, own.training.batch_tokens, cfg.seed, "toy", device(cfg))
    with Log(out, cfg.log, name=f"{cfg.name}/toy") as log:
        train({"toy": ToyObjective(toy)}, rows, own.training, out, log=log, description=f"{cfg.name}: toy")
    return (toy.compact() if isinstance(toy, ResidMLP) else toy).requires_grad_(False).eval()


def decomposed_toy(cfg: RunConfig, toy: Toy, out: Path) -> ParameterDecomposition:
    """Trained; goes on from a checkpoint in `out`."""
    own, spd = toy_settings(cfg)
    decomposition = ParameterDecomposition(find_maps(toy, spd.maps), spd.importance, cfg.seed, spd.tie)
    batch = cfg.training.batch_tokens
    # Adversaries may carry a source for each row of a batch.
    gathers = not any(each.adversarial for each in spd.losses.values())
    subject = CountedVectors(toy) if gathers else Vectors(toy)
    objective = SPDObjective(decomposition, subject, spd, (batch,))
    if not saved_steps(out / "checkpoint"):
        objective.start(cfg.name)
    stream = GatheredFeatures if gathers else SparseFeatures
    rows = stream(own, batch, cfg.seed, "spd", device(cfg))

    def look(step: int) -> dict[str, float]:
        return scores(recovered_toy(cfg, toy, decomposition))

    with Log(out, cfg.log, name=f"{cfg.name}/{out.name}") as log:
        train({"spd": objective}, rows, cfg.training, out, log=log, evaluate=look, description=cfg.name)
    return decomposition.eval()


def recovered_toy(cfg: RunConfig, toy: Toy, decomposition: ParameterDecomposition) -> ToyRecovery:
    return toy_recovery(decomposition, toy, toy_settings(cfg)[0], cfg.seed)
