"""How anything is trained: decompositions, and language models from nothing."""

from dataclasses import dataclass, field
from enum import Enum

from nndecomp.config.checks import DType, require
from nndecomp.config.tokens import TokensConfig


class Optimizer(Enum):
    adam = "adam"
    adamw = "adamw"
    sign = "sign"  # signed momentum without a schedule of its own (Signum)
    muon = "muon"  # orthogonalised momentum for matrices, AdamW for the rest


class LrSchedule(Enum):
    constant = "constant"
    linear = "linear"  # to lr_end over the last lr_decay share of the steps
    cosine = "cosine"  # to lr_end over all steps after warm-up


@dataclass(kw_only=True)
class TrainingConfig:
    n_tokens: int
    batch_tokens: int
    optimizer: Optimizer = Optimizer.adam
    lr: float
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0  # on matrices only
    lr_schedule: LrSchedule = LrSchedule.linear
    lr_warmup: float = 0.02  # share of the steps
    lr_decay: float = 0.2  # share of the steps
    lr_end: float = 0.0  # share of lr
    clip_norm: float | None = 1.0  # per decomposition; null: no clipping
    autocast: DType = DType.float32  # bfloat16: forward and backward in bf16, parameters in fp32
    checkpoint_every: int = 1000  # steps
    evaluate_every: int = 0  # steps; 0: only at the end
    log_every: int = 50  # steps
    # The jobs of a sweep, in one process, on one stream of rows for all that read the same text and model in the same order;
    # each in its own directory, with the weights it would have by itself.
    share_stream: bool = False

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_tokens

    def __post_init__(self) -> None:
        require(
            0 < self.batch_tokens <= self.n_tokens,
            f"training.batch_tokens={self.batch_tokens} must lie between 1 and training.n_tokens={self.n_tokens}",
        )
        require(self.lr > 0, f"training.lr={self.lr} must be positive")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"training.betas={self.betas} must be two numbers from 0 up to 1",
        )
        require(
            self.lr_warmup >= 0 and self.lr_decay >= 0 and self.lr_warmup + self.lr_decay <= 1,
            f"training.lr_warmup={self.lr_warmup} and training.lr_decay={self.lr_decay} are shares that add to at most 1",
        )
        require(
            self.autocast is not DType.float16,
            "training.autocast=float16 would need loss scaling; use bfloat16 or float32",
        )
        require(0 <= self.lr_end <= 1, f"training.lr_end={self.lr_end} is a share of training.lr, from 0 to 1")
        require(self.weight_decay >= 0, f"training.weight_decay={self.weight_decay} must not be negative")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"training.clip_norm={self.clip_norm} must be positive; null clips nothing",
        )
        require(self.evaluate_every >= 0, f"training.evaluate_every={self.evaluate_every} must be 0 or more steps")
        for name in ("checkpoint_every", "log_every"):
            require(getattr(self, name) > 0, f"training.{name}={getattr(self, name)} must be positive")


@dataclass(kw_only=True)
class PretrainConfig:
    """A LlamaSimpleMLP to train from nothing, and the tokenizer trained for it; or one to train on."""

    # A LlamaSimpleMLP as target.path names it: training goes on from its weights, with its tokenizer.
    start: str | None = None
    start_text: TokensConfig | None = None  # what `start` was trained on: held-out scores on it show what is forgotten

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_ctx: int
    vocab_size: int  # byte-level BPE
    tokenizer_documents: int  # documents of the training split that the tokenizer is trained on

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_mlp", "n_heads", "n_ctx", "tokenizer_documents"):
            require(getattr(self, name) > 0, f"pretrain.{name}={getattr(self, name)} must be positive")
        require(
            self.d_model % (2 * self.n_heads) == 0,
            f"pretrain.d_model={self.d_model} must divide into pretrain.n_heads={self.n_heads} heads of even width",
        )
        require(
            0 < self.n_kv_heads <= self.n_heads and self.n_heads % self.n_kv_heads == 0,
            f"pretrain.n_kv_heads={self.n_kv_heads} must divide pretrain.n_heads={self.n_heads}",
        )
        require(
            self.start_text is None or self.start is not None,
            "pretrain.start_text is the text of pretrain.start, which is null; name it, or leave both out",
        )
        require(
            self.vocab_size > 257,
            f"pretrain.vocab_size={self.vocab_size} must exceed 257: all bytes and the end of text",
        )
