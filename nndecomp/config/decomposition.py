"""The pieces a model is taken into: wiring, sparsity, losses, and how they start."""

from dataclasses import dataclass, field
from typing import Any

from nndecomp.config import decomposition_checks as checks
from nndecomp.config.checks import require
from nndecomp.config.kinds import (
    Activation,
    Architecture,
    AttentionStart,
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
from nndecomp.config.molt_lorsa_checks import RANKS, check_molt_and_lorsa
from nndecomp.config.training import Optimizer

SELECTING = (Activation.topk, Activation.abs_topk, Activation.batchtopk, Activation.matching_pursuit)


@dataclass(kw_only=True)
class DecompositionConfig:
    # --- wiring ---
    architecture: Architecture
    # Points ("mlp_in"), taken at every layer of `layers`, or single sites ("L3.mlp_in", "blocks.3.hook_mlp_out"); of
    # two models, each begins with the model's name ("A:mlp_in", "B:L3.mlp_in"); "z.h*" is every head on its own.
    reads: list[str]
    writes: list[str]
    layers: list[int] | None = None  # null: all layers of the target
    n_features: int  # in each group; dedicated_feature_crosscoder: in the shared group, which may have none
    n_exclusive: list[int] | None = None  # dedicated_feature_crosscoder: features of A alone, of B alone
    skip: bool = False  # add a linear map from what a group reads to what it writes
    ranking: Ranking = Ranking.activation  # neurons: which k of them a token keeps
    # --- molt: transforms of low rank; a code multiplies (x V) U ---
    # (rank, how many) in one period of n_features; lists, since what is said of a mapping would be added to it
    ranks: list[list[int]] = field(default_factory=lambda: [list(pair) for pair in RANKS])
    # --- lorsa: heads that read and write one direction each, n_features / n_qk_heads of them by one attention pattern ---
    n_qk_heads: int | None = None  # attention patterns; null: as many as the target has heads
    d_qk: int | None = None  # of a query and a key; null: the target's d_head
    rotary: bool = True  # queries and keys turn with position as the target's do, if they do
    attention_start: AttentionStart = AttentionStart.target
    # --- encoder and activation function ---
    encoder: Encoder = Encoder.linear
    activation: Activation
    k: Any  # active features per token and group: one number, or a list with one a group; null where nothing selects
    scope: Scope = Scope.group
    code_normalisation: CodeNormalisation = CodeNormalisation.none  # c: selection and thresholds see z c
    mixed_weights: list[float] = field(default_factory=lambda: [1.0, 0.1])  # of sae and crosscoder in `mixed`
    centre_input: bool = False  # sae: encode x - b_dec
    k_start: int | None = None  # anneal k from here ...
    k_anneal: float = 0.0  # ... over this share of training
    threshold_rate: float = 0.1  # batchtopk: moving average of the smallest value kept; 0.01 lags 100 steps behind
    jumprelu_threshold: float = 0.1  # initial
    jumprelu_bandwidth: float = 0.1  # of the rectangle kernel, in units of z c, as thresholds are
    jumprelu_gradient: JumpReluGradient = JumpReluGradient.exact
    jumprelu_log_threshold: bool = False  # learn log theta
    # --- losses ---
    reconstruction: Reconstruction = Reconstruction.normalised
    matryoshka: list[float] | None = (
        None  # share of each group's features in each block; prefixes of blocks reconstruct
    )
    matryoshka_weights: list[float] | None = None  # of each prefix; null: all the same, adding to 1
    penalty: Penalty = Penalty.none
    penalty_coefficient: float = 0.0
    penalty_normalisation: CodeNormalisation = (
        CodeNormalisation.none
    )  # c: the penalty sees f c, the loss of z weighs by c
    penalty_scale: float = 4.0  # s in tanh(s f c)
    penalty_frequency: float = 0.01  # tanh_quadratic: the frequency at which the penalty doubles
    penalty_target: float | None = None  # l0_target: active features a token, in each group
    penalty_warmup: float = 0.1  # share of training over which the coefficient rises from 0
    p_start: float = 1.0  # lp
    p_end: float = 0.2
    p_anneal: list[float] = field(default_factory=lambda: [0.5, 1.0])  # shares of training between which p moves
    p_steps: int = 10  # in how many steps
    gate_coefficient: float = 1.0  # gated: the gate alone reconstructs
    gate_trains_decoder: bool = (
        False  # gated: the gate's reconstruction and penalty move decoder and bias, as in SAELens
    )
    pre_activation_loss: PreActivationLoss = PreActivationLoss.none
    pre_activation_coefficient: float = 0.0
    local_coefficient: float = 1.0  # of the reconstruction loss; 0: end to end alone
    end_to_end: EndToEnd = EndToEnd.none
    end_to_end_coefficient: float = 0.0
    end_to_end_sites: Together = Together.all
    # --- dead features ---
    dead: Dead = Dead.aux_k
    dead_after_tokens: int = 1_000_000  # a feature that has not fired for so long is dead
    aux_coefficient: float = 1 / 32  # of aux_k and ghost
    aux_k: int = 64
    resample_every: int = 10_000_000  # tokens
    resample_scale: float = 0.2  # norm of a new encoder row, as a share of the mean of those alive
    # --- start ---
    decoder: Decoder = Decoder.free
    archetypes: int = 4096  # archetypal: data points whose hull the decoder starts in
    archetypal_slack: float = 1.0  # how far a row may leave the hull, as a share of the mean distance of its points
    directions: Directions = Directions.random
    subspace_share: float = 0.5  # active_subspace, heads: of the principal directions
    tied: bool | None = None  # the encoder starts as the decoder's transpose; null: where a group writes what it reads
    decoder_norm: float | None = None  # initial; null: 1 where tied or unit_norm, else 0.1
    decoder_norm_search: bool = False  # initial norms, the best of a grid on data
    initial_bias: InitialBias = InitialBias.mean  # of b_dec
    centre_pre_activations: bool = False  # b_enc starts as minus the mean pre-activation
    initial_tokens: int = 8192  # rows that data-dependent starts are computed from
    # --- its own training settings; null: as `training` says ---
    optimizer: Optimizer | None = None
    lr: float | None = None
    betas: list[float] | None = None
    threshold_lr: float = 1.0  # jumprelu: learning rate of thresholds, as a share of the others'

    @property
    def ks(self) -> list[int]:
        """k as a list: one entry for all groups, or one a group."""
        return [self.k] if isinstance(self.k, int) else list(self.k)

    @property
    def selects(self) -> bool:
        """Whether the activation function keeps k features."""
        return self.activation in SELECTING

    @property
    def unit_norm_decoder(self) -> bool:
        return self.decoder is Decoder.unit_norm

    def __post_init__(self) -> None:
        checks.check_k(self)
        checks.check_effects(self)
        checks.check_ranges(self)
        checks.check_decoder(self)
        checks.check_baseline(self)
        check_molt_and_lorsa(self)
        if self.layers is not None:
            require(
                self.layers == sorted(set(self.layers)) and len(self.layers) > 0,
                f"decomposition.layers={self.layers} must be increasing, each layer once",
            )
        require(
            self.penalty not in (Penalty.l0, Penalty.l0_target) or self.activation is Activation.jumprelu,
            f"decomposition.penalty={self.penalty.value} needs decomposition.activation=jumprelu, "
            f"not {self.activation.value}",
        )
        require(
            (self.penalty is Penalty.l0_target) == (self.penalty_target is not None),
            f"decomposition.penalty_target={self.penalty_target} does not go with "
            f"decomposition.penalty={self.penalty.value}: l0_target needs it, and nothing else",
        )
        same = self.reads == self.writes
        for name, on in (("centre_input", self.centre_input), ("activation=matching_pursuit", self._pursues)):
            require(
                not on or same,
                f"decomposition.{name} needs a dictionary that writes what it reads, but reads={self.reads} "
                f"and writes={self.writes}",
            )
        for name in ("encoder", "code_normalisation", "centre_input", "scope", "centre_pre_activations"):
            value, initial = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(
                not self._pursues or value == initial,
                f"decomposition.{name}={getattr(value, 'value', value)} has no meaning for "
                "decomposition.activation=matching_pursuit, whose decoder encodes; leave it out",
            )
        require(
            not self.jumprelu_log_threshold or self.jumprelu_threshold > 0,
            f"decomposition.jumprelu_threshold={self.jumprelu_threshold} has no logarithm; "
            "write a positive one, or jumprelu_log_threshold=false",
        )
        require(
            self.code_normalisation is not CodeNormalisation.decoupled or self.architecture is Architecture.crosscoder,
            f"decomposition.code_normalisation=decoupled is for decomposition.architecture=crosscoder, whose features "
            f"write all sites, not for {self.architecture.value}; write sae",
        )
        require(
            self.penalty_normalisation is not CodeNormalisation.decoupled
            or self.code_normalisation is CodeNormalisation.decoupled,
            "decomposition.penalty_normalisation=decoupled needs codes of each site on its own, "
            "decomposition.code_normalisation=decoupled; of one code for all sites write sae or crosscoder",
        )
        require(
            (self.architecture is Architecture.dedicated_feature_crosscoder) == (self.n_exclusive is not None),
            f"decomposition.n_exclusive={self.n_exclusive} does not go with "
            f"decomposition.architecture={self.architecture.value}: dedicated_feature_crosscoder needs it, "
            "e.g. n_exclusive=[256,256], and nothing else",
        )

    @property
    def _pursues(self) -> bool:
        return self.activation is Activation.matching_pursuit
