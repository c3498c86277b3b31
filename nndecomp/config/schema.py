"""The settings. Dataclasses hold types and invariants; conf/*.yaml hold values. One file a group; import them from here.

Not frozen: OmegaConf cannot fill a frozen schema from YAML. Not Literal: it cannot type one. Hence Enum, whose member
names are what one writes on the command line. No tuples: they come back as lists.
"""

import re
from dataclasses import dataclass, field

from nndecomp.config.activations import ActivationsConfig, ActivationsKind, Normalisation
from nndecomp.config.canonical import CanonicalConfig
from nndecomp.config.checks import DType, require
from nndecomp.config.compare import CompareConfig
from nndecomp.config.decomposition import DecompositionConfig
from nndecomp.config.evaluation import EvaluationConfig, Inputs, Patched
from nndecomp.config.faithfulness import FaithfulnessConfig
from nndecomp.config.kinds import (
    Activation,
    Architecture,
    AttentionStart,
    BackendKind,
    CodeNormalisation,
    Dead,
    Decoder,
    Directions,
    Encoder,
    EndToEnd,
    InitialBias,
    JumpReluGradient,
    Penalty,
    PreActivationLoss,
    Ranking,
    Reconstruction,
    Scope,
    Together,
)
from nndecomp.config.log import LogConfig, Wandb
from nndecomp.config.spd import SPDConfig
from nndecomp.config.synthetic import (
    Correlation,
    Frequencies,
    Magnitudes,
    Plan,
    PlantedConfig,
    SyntheticConfig,
    SyntheticShapeConfig,
)
from nndecomp.config.tail import TailConfig
from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.config.throughput import Question, SizeConfig, ThroughputConfig
from nndecomp.config.tokens import Packing, TokensConfig, TokensKind
from nndecomp.config.toys import ToyConfig, ToyKind
from nndecomp.config.training import LrSchedule, Optimizer, PretrainConfig, TrainingConfig

__all__ = [
    "Activation",
    "ActivationsConfig",
    "ActivationsKind",
    "Architecture",
    "AttentionStart",
    "BackendKind",
    "CanonicalConfig",
    "CodeNormalisation",
    "CompareConfig",
    "Correlation",
    "DType",
    "Dead",
    "Decoder",
    "DecompositionConfig",
    "Directions",
    "Encoder",
    "EndToEnd",
    "EvaluationConfig",
    "FaithfulnessConfig",
    "Frequencies",
    "GroundTruthConfig",
    "InitialBias",
    "Inputs",
    "JumpReluGradient",
    "LogConfig",
    "LrSchedule",
    "Magnitudes",
    "Normalisation",
    "Optimizer",
    "Packing",
    "Patched",
    "Penalty",
    "Plan",
    "PlantedConfig",
    "PreActivationLoss",
    "PretrainConfig",
    "Question",
    "Ranking",
    "Reconstruction",
    "RunConfig",
    "SPDConfig",
    "Scope",
    "SizeConfig",
    "SyntheticConfig",
    "SyntheticShapeConfig",
    "TailConfig",
    "TargetConfig",
    "TargetKind",
    "ThroughputConfig",
    "Together",
    "ToyConfig",
    "ToyKind",
    "TokensConfig",
    "TokensKind",
    "TrainingConfig",
    "Wandb",
    "require",
]


@dataclass(kw_only=True)
class GroundTruthConfig:
    """exp_019: which known worlds, each a file of conf/world, and how often each is drawn and decomposed anew."""

    worlds: list[str]
    seeds: list[int]
    heldout_tokens: int = 8192  # fresh rows on which recovery is measured

    def __post_init__(self) -> None:
        for name, values in (("worlds", self.worlds), ("seeds", self.seeds)):
            require(
                len(values) == len(set(values)) > 0,
                f"ground_truth.{name}={values} must name at least one, and each once",
            )
        require(self.heldout_tokens > 0, f"ground_truth.heldout_tokens={self.heldout_tokens} must be a positive number")


@dataclass(kw_only=True)
class RunConfig:
    name: str  # the experiment
    seed: int
    device: str  # auto, cpu, cuda, cuda:1, mps
    backend: BackendKind = BackendKind.auto
    threads: int | None = None  # CPU threads of one process; null: torch's own choice
    allow_dirty: bool = False  # on SLURM: run code that is not committed
    target: TargetConfig
    # A second model on the same tokens, e.g. `+target@paired_target=tiny_docs`: sites then begin with A: (target) or B:.
    paired_target: TargetConfig | None = None
    tokens: TokensConfig
    activations: ActivationsConfig
    decomposition: DecompositionConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    log: LogConfig
    compare: CompareConfig | None = None
    pretrain: PretrainConfig | None = None
    # Decompositions trained together on one stream, by name: a file of conf/decomposition, then settings of it that
    # differ, e.g. [topk, aux_k=128]. All have n_features and, where they select, k of `decomposition`.
    presets: dict[str, list[str]] = field(default_factory=dict)
    ground_truth: GroundTruthConfig | None = None
    canonical: CanonicalConfig | None = None  # exp_024: how units of decompositions are compared
    spd: SPDConfig | None = None  # a parameter decomposition to train
    # Training compute of each decomposition, in floating-point operations; training.n_tokens follows from it where it is given.
    flops: float | None = None
    faithfulness: FaithfulnessConfig | None = None
    tail: TailConfig | None = None
    throughput: ThroughputConfig | None = None  # exp_020: what is timed
    toy: ToyConfig | None = None  # what it is trained on, in place of `target`
    runs: list[str] = field(default_factory=list)  # finished runs, or directories of them, that are evaluated

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        require(self.flops is None or self.flops > 0, f"flops={self.flops} must be a positive number, or null")
        require(self.threads is None or self.threads > 0, f"threads={self.threads} must be positive, or null")
        require(
            re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None,
            f"device={self.device} is not a device; write auto, cpu, cuda, cuda:<number> or mps",
        )
