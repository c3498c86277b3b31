"""From settings to objects: the one place that knows every kind of everything.

settings -> target -> tokens -> stream of rows -> objectives -> trained dictionaries -> measurements
"""

from nndecomp.build.baselines import baselines
from nndecomp.build.canonical import (
    baseline_instances,
    canonical_settings,
    compared_units,
    component_instances,
    instances,
    method_architectures,
    starts,
    units,
)
from nndecomp.build.collecting import Collected, collected
from nndecomp.build.comparing import Compared, activity, compared, reported_activity, reported_difference
from nndecomp.build.compute import Spent, equal_compute, parameters_at_compute, with_tokens
from nndecomp.build.data import harvester, scales, source, store, stream, synthetic, target
from nndecomp.build.faithful import check_faithful, faithful, finished, reported_faithfulness
from nndecomp.build.finding import Pair, found_again, found_again_rows
from nndecomp.build.finished_runs import (
    measured_parameters,
    measured_runs,
    parameters_at_flops,
    reported_runs,
)
from nndecomp.build.flops import parameter_flops, training_flops
from nndecomp.build.measuring import Heldout, heldout, measured, reported, scores
from nndecomp.build.members import Member, decompositions, members, of_architecture
from nndecomp.build.model_table import model_table, reported_table
from nndecomp.build.parameters import (
    gated,
    gates,
    saved_parameters,
    trained_parameters,
)
from nndecomp.build.presets import world
from nndecomp.build.pursuing import pursuits
from nndecomp.build.recovering import recovered, recovery_rows, truth
from nndecomp.build.settings import (
    check,
    check_length,
    check_runs,
    decomposed_sites,
    device,
    trainable,
)
from nndecomp.build.sharing import Job, check_sharing, trained_together
from nndecomp.build.tail import diagnosed, one_decomposition, reported_tail
from nndecomp.build.throughput import grown_steps, timed_steps
from nndecomp.build.throughput_harvest import speeds, waiting
from nndecomp.build.throughput_quality import agreements
from nndecomp.build.throughput_start import start_times
from nndecomp.build.toy_settings import toy_settings
from nndecomp.build.toys import decomposed_toy, recovered_toy, trained_toy
from nndecomp.build.training import looking, trained, untrained

__all__ = [
    "measured_parameters",
    "measured_runs",
    "model_table",
    "parameters_at_flops",
    "reported_runs",
    "reported_table",
    "parameter_flops",
    "reported_tail",
    "one_decomposition",
    "diagnosed",
    "Collected",
    "Compared",
    "Heldout",
    "Job",
    "Member",
    "Pair",
    "activity",
    "agreements",
    "baseline_instances",
    "baselines",
    "canonical_settings",
    "check",
    "check_faithful",
    "check_length",
    "check_runs",
    "check_sharing",
    "collected",
    "compared",
    "compared_units",
    "component_instances",
    "decomposed_sites",
    "decomposed_toy",
    "decompositions",
    "device",
    "faithful",
    "finished",
    "found_again",
    "found_again_rows",
    "grown_steps",
    "harvester",
    "heldout",
    "instances",
    "looking",
    "measured",
    "members",
    "method_architectures",
    "of_architecture",
    "pursuits",
    "recovered",
    "recovered_toy",
    "recovery_rows",
    "reported",
    "reported_activity",
    "reported_difference",
    "reported_faithfulness",
    "scales",
    "scores",
    "source",
    "speeds",
    "start_times",
    "starts",
    "store",
    "stream",
    "synthetic",
    "target",
    "timed_steps",
    "toy_settings",
    "trainable",
    "trained",
    "trained_together",
    "trained_toy",
    "training_flops",
    "truth",
    "units",
    "untrained",
    "gated",
    "gates",
    "saved_parameters",
    "trained_parameters",
    "Spent",
    "equal_compute",
    "parameters_at_compute",
    "with_tokens",
    "waiting",
    "world",
]
