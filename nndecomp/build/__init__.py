"""From settings to objects: the one place that knows every kind of everything.

settings -> target -> tokens -> stream of rows -> objectives -> trained dictionaries -> measurements
"""

from nndecomp.build.data import harvester, scales, store, stream, target
from nndecomp.build.measuring import Heldout, baselines, heldout, measured, reported, scores
from nndecomp.build.settings import (
    check,
    check_length,
    check_runs,
    decomposed_sites,
    decompositions,
    device,
    of_architecture,
    trainable,
)
from nndecomp.build.training import looking, trained

__all__ = [
    "Heldout",
    "baselines",
    "check",
    "check_length",
    "check_runs",
    "decomposed_sites",
    "decompositions",
    "device",
    "harvester",
    "heldout",
    "looking",
    "measured",
    "of_architecture",
    "reported",
    "scales",
    "scores",
    "store",
    "stream",
    "target",
    "trainable",
    "trained",
]
