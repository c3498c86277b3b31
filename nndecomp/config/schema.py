"""The settings. Dataclasses hold types and invariants; conf/*.yaml hold values.

Not frozen: OmegaConf cannot fill a frozen schema from YAML. Not Literal: it cannot type one. Hence Enum, whose member
names are what one writes on the command line.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nndecomp.errors import SettingError


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise SettingError(sentence)


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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


class TokensKind(Enum):
    stdlib = "stdlib"  # the Python standard library's own source text
    files = "files"  # local .txt .jsonl .parquet, or a directory or glob of them
    hub = "hub"  # a Hugging Face data set, streamed


class Packing(Enum):
    packed = "packed"  # documents joined by EOS, cut into full rows
    documents = "documents"  # one document per row, cut or padded; padding masked


@dataclass(kw_only=True)
class TokensConfig:
    kind: TokensKind
    path: str | None  # files: path or glob; hub: data set id or a local copy; stdlib: null
    subset: str | None = None  # hub: configuration name
    split: str = "train"
    heldout_split: str | None = None  # null: documents are held out by hash, heldout_fraction of them
    heldout_fraction: float = 0.05
    text_column: str = "text"
    tokens_column: str | None = None  # set: rows are already token ids in this column, and text_column is not read
    packing: Packing = Packing.packed
    seq_len: int = 256
    prepend_bos: bool | None = None  # null: as the tokenizer does by itself
    lowercase: bool = False
    shuffle_documents: int = 1000  # documents shuffled together as they stream by; 1 keeps the order

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"tokens.seq_len={self.seq_len} leaves nothing to predict; use 2 or more")
        require(
            0 < self.heldout_fraction < 1,
            f"tokens.heldout_fraction={self.heldout_fraction} must lie between 0 and 1",
        )
        require(
            self.shuffle_documents >= 1,
            f"tokens.shuffle_documents={self.shuffle_documents} must be 1 or more",
        )
        require(
            self.kind is TokensKind.stdlib or bool(self.path),
            f"tokens.path is empty; tokens.kind={self.kind.value} needs a path or a data set id",
        )


class ActivationsKind(Enum):
    live = "live"  # harvested from the target as training goes
    store = "store"  # read from a directory written before


class Normalisation(Enum):
    none = "none"
    dataset = "dataset"  # each site scaled so that E|x|^2 = width; folded into the weights that are saved


@dataclass(kw_only=True)
class ActivationsConfig:
    kind: ActivationsKind
    store: str | None = None  # kind=store: the directory
    batch_seqs: int = 32  # sequences per forward pass of the target
    buffer_tokens: int = 131072  # rows mixed together by the shuffle buffer
    dtype: DType = DType.float32  # of rows in the buffer and in a store
    normalisation: Normalisation = Normalisation.dataset
    normalisation_tokens: int = 1_000_000  # rows over which the scale is measured
    drop_bos: bool = True  # mask BOS positions, whose norm dwarfs all others

    def __post_init__(self) -> None:
        require(self.batch_seqs > 0, f"activations.batch_seqs={self.batch_seqs} must be positive")
        require(self.buffer_tokens > 0, f"activations.buffer_tokens={self.buffer_tokens} must be positive")
        require(
            (self.kind is ActivationsKind.store) == (self.store is not None),
            f"activations.store={self.store} does not go with activations.kind={self.kind.value}; "
            "a store directory is needed for kind=store, and for nothing else",
        )


class Architecture(Enum):
    sae = "sae"  # one site, written back to itself
    per_layer_sae = "per_layer_sae"  # one sae a layer
    transcoder = "transcoder"  # mlp_in of one layer -> its mlp_out
    per_layer_transcoder = "per_layer_transcoder"  # one transcoder a layer
    cross_layer_transcoder = "cross_layer_transcoder"  # mlp_in of layer l -> mlp_out of layers l, l+1, ...
    neurons = "neurons"  # the MLPs' own neurons, the k largest kept: a baseline, never trained


class Activation(Enum):
    relu = "relu"
    topk = "topk"
    batchtopk = "batchtopk"
    jumprelu = "jumprelu"


class Scope(Enum):
    group = "group"  # features compete within their group (their layer)
    all = "all"  # features of all groups compete: k is still per group on average


class Reconstruction(Enum):
    sum_of_squares = "sum_of_squares"  # mean over tokens of |y - y_hat|^2
    mean_of_squares = "mean_of_squares"  # mean over tokens and coordinates
    normalised = "normalised"  # mean over written sites of |y - y_hat|^2 / variance of the site in the batch


class Penalty(Enum):
    none = "none"
    l1 = "l1"
    l1_decoder_norm = "l1_decoder_norm"  # l1 with each feature weighted by its decoder norm
    tanh = "tanh"  # tanh(c f |d|), c = penalty_scale
    l0 = "l0"  # straight-through count; needs jumprelu


@dataclass(kw_only=True)
class DecompositionConfig:
    architecture: Architecture
    # Points ("mlp_in"), taken at every layer of `layers`, or single sites ("L3.mlp_in", "blocks.3.hook_mlp_out").
    reads: list[str]
    writes: list[str]
    layers: list[int] | None = None  # null: all layers of the target
    n_features: int  # in each group
    activation: Activation
    k: Any  # active features per token and group: one number, or a list with one a group; null for relu, jumprelu
    scope: Scope = Scope.group
    skip: bool = False  # add a linear map from what a group reads to what it writes
    centre_input: bool = False  # sae: encode x - b_dec
    unit_norm_decoder: bool = False
    reconstruction: Reconstruction = Reconstruction.normalised
    penalty: Penalty = Penalty.none
    penalty_coefficient: float = 0.0
    penalty_scale: float = 4.0  # c in tanh(c f |d|)
    penalty_warmup: float = 0.1  # share of training over which the coefficient rises from 0
    k_start: int | None = None  # anneal k from here ...
    k_anneal: float = 0.0  # ... over this share of training
    aux_coefficient: float = 1 / 32  # aux-k: dead features reconstruct the residual; 0 switches it off
    aux_k: int = 64
    dead_after_tokens: int = 1_000_000  # a feature that has not fired for so long is dead
    threshold_rate: float = 0.01  # batchtopk: moving average of the smallest value kept
    jumprelu_threshold: float = 0.1  # initial
    jumprelu_bandwidth: float = 0.1  # of the rectangle kernel, in units of the pre-activations

    @property
    def ks(self) -> list[int]:
        """k as a list: one entry for all groups, or one a group."""
        return [self.k] if isinstance(self.k, int) else list(self.k)

    def __post_init__(self) -> None:
        selects = self.activation in (Activation.topk, Activation.batchtopk)
        require(self.n_features > 0, f"decomposition.n_features={self.n_features} must be positive")
        whole = lambda k: isinstance(k, int) and not isinstance(k, bool)  # noqa: E731
        if selects:
            valid = whole(self.k) or (isinstance(self.k, list) and self.k and all(map(whole, self.k)))
            require(
                bool(valid),
                f"decomposition.k={self.k!r} is not a whole number or a list of them; "
                f"decomposition.activation={self.activation.value} keeps k features per token",
            )
            for k in [*self.ks, *([] if self.k_start is None else [self.k_start])]:
                require(
                    0 < k <= self.n_features,
                    f"decomposition.k={k} must lie between 1 and decomposition.n_features={self.n_features}",
                )
        else:
            require(
                self.k is None,
                f"decomposition.k={self.k} has no meaning for decomposition.activation={self.activation.value}; "
                "write decomposition.k=null",
            )
        require(
            self.penalty is not Penalty.l0 or self.activation is Activation.jumprelu,
            f"decomposition.penalty=l0 needs decomposition.activation=jumprelu, not {self.activation.value}",
        )
        require(
            not self.centre_input or self.reads == self.writes,
            f"decomposition.centre_input=true needs an SAE, but reads={self.reads} and writes={self.writes}",
        )
        if self.layers is not None:
            require(
                self.layers == sorted(set(self.layers)) and len(self.layers) > 0,
                f"decomposition.layers={self.layers} must be increasing, each layer once",
            )


class Optimizer(Enum):
    adam = "adam"
    adamw = "adamw"


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
        for name in ("checkpoint_every", "log_every"):
            require(getattr(self, name) > 0, f"training.{name}={getattr(self, name)} must be positive")


class Inputs(Enum):
    clean = "clean"  # replacements computed from the undisturbed run
    live = "live"  # each read sees what arrives in the patched run: errors compound


class Patched(Enum):
    all = "all"  # every written site at once
    single = "single"  # each written site alone
    prefixes = "prefixes"  # the first one, the first two, ...


@dataclass(kw_only=True)
class EvaluationConfig:
    n_seqs: int
    batch_seqs: int
    inputs: list[Inputs]
    patched: list[Patched]
    mean_seqs: int = 64  # sequences of the training split that give the means for mean-ablation
    bootstrap: int = 1000  # resamples of sequences
    confidence: float = 0.95

    def __post_init__(self) -> None:
        require(self.n_seqs >= 2, f"evaluation.n_seqs={self.n_seqs}: intervals need at least 2 sequences")
        require(self.batch_seqs > 0, f"evaluation.batch_seqs={self.batch_seqs} must be positive")
        require(self.mean_seqs > 0, f"evaluation.mean_seqs={self.mean_seqs} must be positive")
        require(0 < self.confidence < 1, f"evaluation.confidence={self.confidence} must lie between 0 and 1")


class Wandb(Enum):
    disabled = "disabled"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class LogConfig:
    wandb: Wandb
    project: str = "nndecomp"
    entity: str | None = None
    group: str | None = None


@dataclass(kw_only=True)
class CompareConfig:
    """A grid of decompositions trained together on one stream, each otherwise as `decomposition` says."""

    architectures: list[Architecture]
    k: list[int]


@dataclass(kw_only=True)
class PretrainConfig:
    """A LlamaSimpleMLP to train from nothing, and the tokenizer trained for it."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_ctx: int
    vocab_size: int  # byte-level BPE
    tokenizer_documents: int  # documents of the training split that the tokenizer is trained on


@dataclass(kw_only=True)
class RunConfig:
    name: str  # the experiment
    seed: int
    device: str  # auto, cpu, cuda, cuda:1, mps
    target: TargetConfig
    tokens: TokensConfig
    activations: ActivationsConfig
    decomposition: DecompositionConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    log: LogConfig
    compare: CompareConfig | None = None
    pretrain: PretrainConfig | None = None
    runs: list[str] = field(default_factory=list)  # finished runs, or directories of them, that are evaluated
