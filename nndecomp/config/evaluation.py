"""What is measured, on how much held-out text."""

from dataclasses import dataclass, field
from enum import Enum

from nndecomp.config.checks import require
from nndecomp.config.spd import AscentConfig, SourceScope


class Inputs(Enum):
    clean = "clean"  # replacements computed from the undisturbed run
    live = "live"  # each read sees what arrives in the patched run: errors compound
    # Of parameter decompositions: gates from the undisturbed run, components read what arrives, as in their training.
    clean_gates = "clean_gates"


class Patched(Enum):
    all = "all"  # every written site at once
    single = "single"  # each written site alone
    prefixes = "prefixes"  # the first one, the first two, ...


class EvaluatedMasks(Enum):
    """m of all components and mu of what they leave of the weights, g the importances of the undisturbed run."""

    importance = "importance"  # m = g, nothing left over
    rounded = "rounded"  # m = 1 where g > 0, else 0, nothing left over
    ones = "ones"  # m = 1, nothing left over
    zeros = "zeros"  # m = 0, nothing left over: of each map its bias alone is there
    random = "random"  # m even in [0, 1] whatever g is, nothing left over
    stochastic = "stochastic"  # m = g + (1 - g) rho, rho and mu even in [0, 1]
    pgd = "pgd"  # m = g + (1 - g) s, mu = s, with s found by ascent on the KL of each batch
    pgd_shared = "pgd_shared"  # the same with one s for all held-out text, found by ascent on the KL of all of it


@dataclass(kw_only=True)
class MasksConfig:
    """A parameter decomposition under masks that no replacement of the model would have: how far can it be pushed?"""

    kinds: list[EvaluatedMasks] = field(default_factory=list)
    delta: bool = True  # what components leave of the weights takes part in stochastic and pgd
    pgd: AscentConfig = field(default_factory=lambda: AscentConfig(n_steps=20, step_size=0.1))  # of pgd and pgd_shared
    # m = g for the maps of some of these patterns alone, the others left as they are: name -> patterns of module paths.
    subsets: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = [each.value for each in self.kinds]
        require(len(set(kinds)) == len(kinds), f"evaluation.masks.kinds={kinds} must name each once")
        self.pgd.check("evaluation.masks.pgd", least_steps=1)
        require(
            EvaluatedMasks.pgd_shared not in self.kinds
            or self.pgd.source_scope in (SourceScope.single, SourceScope.across_batch),
            f"evaluation.masks.pgd.source_scope={self.pgd.source_scope.value} has sources for single sequences, which "
            "evaluation.masks.kinds=[pgd_shared] cannot share; write single or across_batch",
        )
        for name, patterns in self.subsets.items():
            require(
                name.isidentifier() and bool(patterns),
                f"evaluation.masks.subsets.{name}={patterns} must be a word and patterns of maps, e.g. reads: [h.*.mlp.c_fc]",
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    n_seqs: int
    batch_seqs: int
    inputs: list[Inputs]
    patched: list[Patched]
    mean_seqs: int = 64  # full sequences' worth of training rows that give the means for mean-ablation, or more
    bootstrap: int = 1000  # resamples of sequences
    confidence: float = 0.95
    # What writes what it reads, measured a second time for each of these k: the same decoder, its codes found by gradient
    # pursuit, k features a group, with errors in units of raw activations. Named <name>_pursuit<k>.
    pursuit: list[int] = field(default_factory=list)
    # Gates of parameter decompositions, each measured on its own beside the importances themselves: components with an
    # importance above a threshold, the k largest of each map, the k largest of all maps together. Where finished runs are
    # evaluated, topk is of dictionaries too: the k largest features of each group in place of their own selection.
    thresholds: list[float] = field(default_factory=lambda: [0.0, 0.5])
    topk: list[int] = field(default_factory=list)
    topk_all: list[int] = field(default_factory=list)
    delta: bool = False  # each once more with what the components leave of the weights
    masks: MasksConfig = field(default_factory=MasksConfig)

    def __post_init__(self) -> None:
        require(self.n_seqs >= 2, f"evaluation.n_seqs={self.n_seqs}: intervals need at least 2 sequences")
        require(self.batch_seqs > 0, f"evaluation.batch_seqs={self.batch_seqs} must be positive")
        require(self.mean_seqs > 0, f"evaluation.mean_seqs={self.mean_seqs} must be positive")
        require(self.bootstrap >= 0, f"evaluation.bootstrap={self.bootstrap} must be 0 or more resamples")
        for name in ("inputs", "patched"):
            chosen = [each.value for each in getattr(self, name)]
            require(
                len(chosen) == len(set(chosen)) > 0,
                f"evaluation.{name}={chosen} must name at least one, and each once",
            )
        require(
            Patched.all in self.patched,
            f"evaluation.patched={[each.value for each in self.patched]} lacks all, which tables and figures show",
        )
        require(
            all(k > 0 for k in self.pursuit) and len(set(self.pursuit)) == len(self.pursuit),
            f"evaluation.pursuit={self.pursuit} must be positive numbers of features, each once, or []",
        )
        for name in ("topk", "topk_all"):
            values = getattr(self, name)
            require(
                all(k > 0 for k in values) and len(set(values)) == len(values),
                f"evaluation.{name}={values} must be positive numbers of components, each once, or []",
            )
        require(
            all(0 <= each < 1 for each in self.thresholds) and len(set(self.thresholds)) == len(self.thresholds),
            f"evaluation.thresholds={self.thresholds} must be importances from 0 up to 1, each once, or []",
        )
        pgd = self.masks.pgd
        require(
            pgd.source_scope is not SourceScope.repeated or self.batch_seqs % pgd.source_repeats == 0,
            f"evaluation.masks.pgd.source_repeats={pgd.source_repeats} must divide evaluation.batch_seqs={self.batch_seqs}",
        )
        require(0 < self.confidence < 1, f"evaluation.confidence={self.confidence} must lie between 0 and 1")
