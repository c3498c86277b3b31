"""Stochastic parameter decomposition: which linear maps become sums of rank-one components, and what trains them."""

from dataclasses import dataclass, field
from enum import Enum

from nndecomp.config.checks import require


class ImportanceKind(Enum):
    """What says how much each component matters on a token, from the inputs of the decomposed maps."""

    mlp = "mlp"  # one MLP a component, which sees what the component reads, x V_c, alone
    vector_mlp = "vector_mlp"  # one MLP a component, which sees all of the map's input x
    shared_mlp = "shared_mlp"  # one MLP a map: x -> the importances of all its components
    global_shared_mlp = "global_shared_mlp"  # one MLP: the inputs of all maps -> all importances
    global_shared_transformer = "global_shared_transformer"  # a transformer over the positions, from the same


class Sampling(Enum):
    """rho of a mask g + (1 - g) rho."""

    continuous = "continuous"  # even in [0, 1]
    binomial = "binomial"  # 0 or 1


class Masks(Enum):
    """m of the components and mu of what they leave of the weights, in one reconstruction loss."""

    stochastic = "stochastic"  # m = g + (1 - g) rho, mu even in [0, 1]
    importance = "importance"  # m = g, nothing left over
    ones = "ones"  # m = 1, nothing left over
    pgd = "pgd"  # m = g + (1 - g) s, mu = s, with s found anew by ascent on each batch
    persistent_pgd = "persistent_pgd"  # the same s, carried from step to step


class Routing(Enum):
    """Where components stand in for their map; elsewhere it is the map itself."""

    all = "all"
    subset = "subset"  # at each position k of the maps, k even in 1 .. number of maps
    layerwise = "layerwise"  # one map at a time, one run for each
    share = "share"  # each map at each position with probability `routed_share`


class Reconstructed(Enum):
    outputs = "outputs"  # the model's output: KL for language models, squared errors for vectors
    hidden = "hidden"  # outputs of the decomposed maps: squared errors


class SourceStart(Enum):
    random = "random"  # even in [0, 1]
    ones = "ones"
    zeros = "zeros"


class SourceScope(Enum):
    """How many adversarial sources s there are, each with an entry a component and one for what is left over."""

    single = "single"  # one for all sequences and positions
    across_batch = "across_batch"  # one a position
    repeated = "repeated"  # one a position of `source_repeats` sequences, in turn
    each = "each"  # one a sequence and position


class SourceOptimizer(Enum):
    sign = "sign"
    adam = "adam"


@dataclass(kw_only=True)
class ImportanceConfig:
    kind: ImportanceKind
    hidden: list[int] = field(default_factory=lambda: [16])  # widths of hidden layers, of MLPs
    # of the transformer
    d_model: int = 256
    n_blocks: int = 2
    n_heads: int = 4
    d_mlp: int = 1024
    causal: bool = True  # false: importances of a position see the text that follows
    rotary_base: float = 10_000.0

    @property
    def is_global(self) -> bool:
        return self.kind in (ImportanceKind.global_shared_mlp, ImportanceKind.global_shared_transformer)

    def __post_init__(self) -> None:
        transformer = self.kind is ImportanceKind.global_shared_transformer
        require(
            all(width > 0 for width in self.hidden) and (transformer or len(self.hidden) > 0),
            f"spd.importance.hidden={self.hidden} must name widths of hidden layers, e.g. [16]",
        )
        for name in ("d_model", "n_blocks", "n_heads", "d_mlp"):
            require(getattr(self, name) > 0, f"spd.importance.{name}={getattr(self, name)} must be positive")
        require(
            not transformer or self.d_model % (2 * self.n_heads) == 0,
            f"spd.importance.d_model={self.d_model} must divide into spd.importance.n_heads={self.n_heads} heads of even width",
        )


@dataclass(kw_only=True)
class AscentConfig:
    """The adversary of pgd and persistent_pgd."""

    n_steps: int = 1  # of ascent on a batch, before the loss is taken
    step_size: float = 1.0  # pgd
    source_start: SourceStart = SourceStart.random
    source_scope: SourceScope = SourceScope.single
    source_repeats: int = 8

    def check(self, where: str, least_steps: int) -> None:
        require(self.n_steps >= least_steps, f"{where}.n_steps={self.n_steps} must be a number of steps of ascent")
        require(self.step_size > 0, f"{where}.step_size={self.step_size} must be positive")
        require(self.source_repeats > 0, f"{where}.source_repeats={self.source_repeats} must be positive")


@dataclass(kw_only=True)
class ReconstructionConfig(AscentConfig):
    """One reconstruction loss."""

    coefficient: float
    masks: Masks
    routing: Routing = Routing.all
    routed_share: float = 0.5
    reconstructed: Reconstructed = Reconstructed.outputs
    n_samples: int = 1  # of stochastic masks
    # persistent_pgd
    source_optimizer: SourceOptimizer = SourceOptimizer.adam
    source_lr: float = 0.01
    source_lr_warmup: float = 0.0  # share of training
    source_betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    source_sigmoid: bool = False  # s is the sigmoid of what is carried

    @property
    def adversarial(self) -> bool:
        return self.masks in (Masks.pgd, Masks.persistent_pgd)

    def __post_init__(self) -> None:
        require(
            self.coefficient > 0, f"spd.losses.*.coefficient={self.coefficient} must be positive; leave the loss out"
        )
        require(0 < self.routed_share <= 1, f"spd.losses.*.routed_share={self.routed_share} must be a share, above 0")
        require(self.n_samples > 0, f"spd.losses.*.n_samples={self.n_samples} must be positive")
        persistent = self.masks is Masks.persistent_pgd
        self.check("spd.losses.*", least_steps=0 if persistent else 1)
        require(self.source_lr > 0, f"spd.losses.*.source_lr={self.source_lr} must be positive")
        require(
            0 <= self.source_lr_warmup <= 1,
            f"spd.losses.*.source_lr_warmup={self.source_lr_warmup} is a share of training",
        )
        require(
            len(self.source_betas) == 2 and all(0 <= b < 1 for b in self.source_betas),
            f"spd.losses.*.source_betas={self.source_betas} must be two numbers from 0 up to 1",
        )
        require(
            not persistent or self.routing is not Routing.layerwise,
            "spd.losses.*.routing=layerwise has one run a map, but spd.losses.*.masks=persistent_pgd carries one set of "
            "sources; write routing=all or subset",
        )


@dataclass(kw_only=True)
class SPDConfig:
    """W ~ (V U)^T for each chosen map; Bushnaq, Braun and Sharkey 2025, arXiv 2506.20790."""

    # Components of each map, by a pattern of module paths ("h.*.mlp.c_fc"); every pattern matches, no map twice.
    maps: dict[str, int]
    # Map -> map: where one matrix is used twice, the components of the first are those of the second, transposed.
    tie: dict[str, str] = field(default_factory=dict)
    importance: ImportanceConfig
    sampling: Sampling = Sampling.continuous
    delta: bool = True  # what the components leave of the weights takes part in stochastic and adversarial losses
    faithfulness: float  # coefficient of the mean squared error of the weights
    minimality: float  # coefficient of the importance-minimality loss, sum over components of h^p
    minimality_end: float | None = None  # null: the coefficient stays
    minimality_anneal: list[float] = field(default_factory=lambda: [0.0, 1.0])  # shares of training; by factors
    p_start: float = 2.0
    p_end: float | None = None  # null: p stays
    p_anneal: list[float] = field(default_factory=lambda: [0.0, 1.0])  # shares of training between which p moves
    frequency: float = 0.0  # beta: components that are important more often cost more, by log2(1 + sum over the batch)
    losses: dict[str, ReconstructionConfig]
    clip_components: float | None = 0.01  # norm of the gradient of V and U; importances are not clipped
    # Faithfulness alone, with an optimiser of its own, before training.
    warmup_steps: int = 400
    warmup_lr: float = 1e-3
    warmup_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(bool(self.maps), "spd.maps={} names no map; write e.g. spd.maps={h.*.mlp.c_fc: 512}")
        for pattern, n in self.maps.items():
            require(n > 0, f"spd.maps has {n} components for {pattern}; write a positive number")
        for name, other in self.tie.items():
            require(
                other not in self.tie,
                f"spd.tie={{{name}: {other}}} names a map that is itself tied; tie it to one that has components of its own",
            )
        require(bool(self.losses), "spd.losses={} reconstructs nothing; name at least one loss")
        for name in self.losses:
            require(
                name.isidentifier() and name not in ("loss", "faithfulness", "minimality"),
                f"spd.losses has a loss called {name}; write a word that is not loss, faithfulness or minimality",
            )
        for name in ("faithfulness", "minimality", "frequency", "warmup_weight_decay"):
            require(getattr(self, name) >= 0, f"spd.{name}={getattr(self, name)} must not be negative")
        require(self.p_start > 0, f"spd.p_start={self.p_start} must be positive")
        require(self.p_end is None or self.p_end > 0, f"spd.p_end={self.p_end} must be positive, or null")
        for name in ("p_anneal", "minimality_anneal"):
            shares: list[float] = getattr(self, name)
            require(
                len(shares) == 2 and 0 <= shares[0] < shares[1] <= 1,
                f"spd.{name}={shares} must be two increasing shares of training",
            )
        require(
            self.minimality_end is None or min(self.minimality, self.minimality_end) > 0,
            f"spd.minimality_end={self.minimality_end} is approached by factors from spd.minimality={self.minimality}: both "
            "must be positive; null keeps the first",
        )
        require(
            self.clip_components is None or self.clip_components > 0,
            f"spd.clip_components={self.clip_components} must be positive; null clips nothing",
        )
        require(self.warmup_steps >= 0, f"spd.warmup_steps={self.warmup_steps} must be 0 or more")
        require(self.warmup_lr > 0, f"spd.warmup_lr={self.warmup_lr} must be positive")
