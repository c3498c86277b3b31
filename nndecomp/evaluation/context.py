"""What stands beside every measurement: which decomposition, of what, in which run."""

import math
from collections.abc import Sequence

from nndecomp.config.schema import Activation, RunConfig
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import GateKind
from nndecomp.evaluation.rows import Context
from nndecomp.targets.base import Target

SPD = "spd"  # what rows call the architecture of parameter decompositions


def context(cfg: RunConfig, target: Target, parts: Sequence[Replacement], run: str, name: str, seed: int) -> Context:
    """Of a replacement, named `name` in its run, trained with `seed`."""
    match parts[0]:
        case SparseDictionary(spec=spec):
            architecture = f"skip_{spec.architecture}" if spec.skip else spec.architecture
            activation, k = spec.activation.kind.value, spec.activation.k
            n_features = spec.groups[0].n_features
        case NeuronBaseline(k=k):
            architecture, activation = parts[0].family, Activation.topk.value
            n_features = parts[0].costs[0].n_components
        case GatedParameters(gate=gate):
            architecture, activation = f"{SPD}_with_delta" if gate.delta else SPD, gate.kind.value
            k = (gate.value,) if gate.kind in (GateKind.topk, GateKind.topk_all) and gate.value is not None else ()
            n_features = parts[0].costs[0].n_components
        case other:
            raise AssertionError(f"rows cannot name a {type(other).__name__}")
    return Context(
        experiment=cfg.name,
        run=run,
        name=name,
        target=target.name,
        tokens=cfg.tokens.path or cfg.tokens.kind.value,
        split="heldout",
        architecture=architecture,
        layers=",".join(dict.fromkeys(str(site.layer) for part in parts for site in part.writes)),
        n_features=n_features,
        activation=activation,
        k=sum(k) / len(k) if k else math.nan,
        seed=seed,
    )
