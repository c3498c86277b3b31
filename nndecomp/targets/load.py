"""Settings -> target."""

from pathlib import Path

import torch

from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.errors import SettingError
from nndecomp.targets import llama_simple_mlp, planted, synthetic, wandb_runs
from nndecomp.targets.base import Target, TargetShape
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget, shape_of
from nndecomp.targets.planted import PlantedTarget
from nndecomp.targets.synthetic import SyntheticTarget

TINY = Path(__file__).parent / "tiny"
SHIPPED = {"tiny": TINY, "tiny_docs": Path(__file__).parent / "tiny_docs"}


def load_target(cfg: TargetConfig, device: torch.device) -> Target:
    """The model in eval mode on `device`, in `cfg.dtype`, its parameters frozen."""
    match cfg.kind:
        case TargetKind.llama_simple_mlp:
            directory = directory_of(cfg, weights=True)
            model = llama_simple_mlp.load(directory).to(device, getattr(torch, cfg.dtype.value))
            return LlamaSimpleMLPTarget(directory.name, model, llama_simple_mlp.load_tokenizer(directory))
        case TargetKind.huggingface:
            from nndecomp.targets import huggingface

            return huggingface.load(cfg, device)
        case TargetKind.transformer_lens:
            from nndecomp.targets import transformer_lens

            return transformer_lens.load(cfg, device)
        case TargetKind.planted:
            assert cfg.planted is not None, "checked with the settings"
            return PlantedTarget(cfg.path, cfg.planted, device, getattr(torch, cfg.dtype.value))
        case TargetKind.synthetic:
            assert cfg.synthetic is not None, "checked with the settings"
            return SyntheticTarget(cfg.path, cfg.synthetic, device)


def target_shape(cfg: TargetConfig) -> TargetShape:
    """Sizes from the configuration file alone."""
    match cfg.kind:
        case TargetKind.llama_simple_mlp:
            return shape_of(llama_simple_mlp.read_config(directory_of(cfg, weights=False)))
        case TargetKind.huggingface | TargetKind.transformer_lens:
            from nndecomp.targets import huggingface

            return huggingface.shape_of(huggingface.read_config(cfg))
        case TargetKind.planted:
            assert cfg.planted is not None, "checked with the settings"
            return planted.shape_of(cfg.planted)
        case TargetKind.synthetic:
            assert cfg.synthetic is not None, "checked with the settings"
            return synthetic.shape_of(cfg.synthetic)


def directory_of(cfg: TargetConfig, weights: bool) -> Path:
    """Where a LlamaSimpleMLP lies; files of a wandb run are fetched first."""
    if cfg.revision is not None:
        raise SettingError(
            f"target.revision={cfg.revision} has no meaning for target.kind={cfg.kind.value}; write null"
        )
    if cfg.path.startswith(wandb_runs.PREFIX):
        return wandb_runs.fetch(cfg.path, weights)
    directory = SHIPPED.get(cfg.path) or Path(cfg.path).expanduser().resolve()
    if not directory.is_dir():
        raise SettingError(
            f"target.path={cfg.path} is not there; write {', '.join(SHIPPED)}, an existing directory, or wandb:<entity>/<project>/<run>"
        )
    return directory
