"""Which model is studied."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import DType


class TargetKind(Enum):
    llama_simple_mlp = "llama_simple_mlp"  # the package's own architecture: a directory or a wandb run
    huggingface = "huggingface"
    transformer_lens = "transformer_lens"


@dataclass(kw_only=True)
class TargetConfig:
    kind: TargetKind
    # "tiny" (ships with the package), a local directory, a Hub id, or wandb:<entity>/<project>/<run>
    path: str
    revision: str | None = None  # Hub revision: branch, tag or commit
    dtype: DType = DType.float32
