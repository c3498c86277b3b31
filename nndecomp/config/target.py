"""Which model is studied."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import DType, require
from nndecomp.config.synthetic import PlantedConfig, SyntheticShapeConfig


class TargetKind(Enum):
    llama_simple_mlp = "llama_simple_mlp"  # the package's own architecture: a directory or a wandb run
    huggingface = "huggingface"
    transformer_lens = "transformer_lens"
    planted = "planted"  # MLPs made of known rules
    synthetic = "synthetic"  # no model: sizes alone, for activations=synthetic


@dataclass(kw_only=True)
class TargetConfig:
    kind: TargetKind
    # "tiny" (ships with the package), a local directory, a Hub id, or wandb:<entity>/<project>/<run>
    path: str
    revision: str | None = None  # Hub revision: branch, tag or commit
    dtype: DType = DType.float32
    planted: PlantedConfig | None = None  # kind=planted
    synthetic: SyntheticShapeConfig | None = None  # kind=synthetic

    def __post_init__(self) -> None:
        for kind, given in ((TargetKind.planted, self.planted), (TargetKind.synthetic, self.synthetic)):
            require(
                (self.kind is kind) == (given is not None),
                f"target.kind={self.kind.value} does not go with target.{kind.value}: kind={kind.value} needs it, and "
                f"nothing else does; write target={kind.value}",
            )
