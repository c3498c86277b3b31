"""Which settings of a decomposition go together; each refusal is one sentence."""

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from nndecomp.config.checks import require
from nndecomp.config.kinds import (
    Activation,
    Architecture,
    CodeNormalisation,
    Dead,
    Decoder,
    Directions,
    EndToEnd,
    Penalty,
    PreActivationLoss,
    Ranking,
)

# Penalties on f c; the others count.
_OF_CODES = (Penalty.l1, Penalty.tanh, Penalty.tanh_quadratic, Penalty.lp)

# A DecompositionConfig, which cannot be named here: its file imports this one.
Settings = Any


def check_k(cfg: Settings) -> None:
    """Whether k fits the activation function, and the number of features."""
    whole = lambda k: isinstance(k, int) and not isinstance(k, bool)  # noqa: E731
    require(
        cfg.n_exclusive is None or (len(cfg.n_exclusive) == 2 and all(n >= 0 for n in cfg.n_exclusive)),
        f"decomposition.n_exclusive={cfg.n_exclusive} must be two whole numbers: features of A alone, of B alone",
    )
    # A dedicated-feature crosscoder may do without shared features. Whether k fits each group is checked with the wiring.
    sizes: list[int] = [cfg.n_features, *(cfg.n_exclusive or [])]
    largest = max(sizes)
    require(
        cfg.n_features > 0 or (cfg.n_features == 0 and largest > 0),
        f"decomposition.n_features={cfg.n_features} must be positive",
    )
    if not cfg.selects:
        require(
            cfg.k is None,
            f"decomposition.k={cfg.k} has no meaning for decomposition.activation={cfg.activation.value}; "
            "write decomposition.k=null",
        )
        return
    valid = whole(cfg.k) or (isinstance(cfg.k, list) and cfg.k and all(map(whole, cfg.k)))
    require(
        bool(valid),
        f"decomposition.k={cfg.k!r} is not a whole number or a list of them; "
        f"decomposition.activation={cfg.activation.value} keeps k features per token",
    )
    for k in [*cfg.ks, *([] if cfg.k_start is None else [cfg.k_start])]:
        require(
            0 < k <= largest,
            f"decomposition.k={k} must lie between 1 and "
            + (
                f"the {largest} features of the largest group"
                if cfg.n_exclusive
                else f"decomposition.n_features={largest}"
            ),
        )
    require(
        (cfg.k_start is None) == (cfg.k_anneal == 0),
        f"decomposition.k_start={cfg.k_start} and decomposition.k_anneal={cfg.k_anneal} go together: "
        "where k starts, and the share of training over which it moves to k",
    )


def check_effects(cfg: Settings) -> None:
    """Refuses settings that would change nothing."""
    effects: list[tuple[bool, str, tuple[str, ...]]] = [
        (cfg.penalty is not Penalty.none, "penalty", ("penalty_coefficient", "penalty_warmup")),
        (_weighs_codes(cfg), "a penalty on codes, or a pre_activation_loss on z", ("penalty_normalisation",)),
        (
            CodeNormalisation.mixed in (cfg.code_normalisation, cfg.penalty_normalisation),
            "code_normalisation=mixed or penalty_normalisation=mixed",
            ("mixed_weights",),
        ),
        (cfg.penalty in (Penalty.tanh, Penalty.tanh_quadratic), "penalty=tanh or tanh_quadratic", ("penalty_scale",)),
        (cfg.penalty is Penalty.tanh_quadratic, "penalty=tanh_quadratic", ("penalty_frequency",)),
        (cfg.penalty is Penalty.lp, "penalty=lp", ("p_start", "p_end", "p_anneal", "p_steps")),
        (cfg.activation is Activation.gated, "activation=gated", ("gate_coefficient", "gate_trains_decoder")),
        (cfg.activation is Activation.batchtopk, "activation=batchtopk", ("threshold_rate",)),
        (
            cfg.activation is Activation.jumprelu,
            "activation=jumprelu",
            ("jumprelu_threshold", "jumprelu_bandwidth", "jumprelu_gradient", "jumprelu_log_threshold", "threshold_lr"),
        ),
        (
            cfg.pre_activation_loss is not PreActivationLoss.none,
            "pre_activation_loss",
            ("pre_activation_coefficient",),
        ),
        (cfg.end_to_end is not EndToEnd.none, "end_to_end", ("end_to_end_coefficient", "end_to_end_sites")),
        (cfg.matryoshka is not None, "matryoshka", ("matryoshka_weights",)),
        (cfg.dead in (Dead.aux_k, Dead.ghost), "dead=aux_k or ghost", ("aux_coefficient",)),
        (cfg.dead is Dead.aux_k, "dead=aux_k", ("aux_k",)),
        (cfg.dead is Dead.resample, "dead=resample", ("resample_every", "resample_scale")),
        (cfg.decoder is Decoder.archetypal, "decoder=archetypal", ("archetypes", "archetypal_slack")),
        (
            cfg.directions in (Directions.active_subspace, Directions.heads),
            "directions=active_subspace or heads",
            ("subspace_share",),
        ),
        (cfg.decoder is not Decoder.unit_norm, "decoder=free", ("decoder_norm", "decoder_norm_search")),
        (cfg.decoder_norm is None, "decoder_norm=null", ("decoder_norm_search",)),
        (cfg.activation is not Activation.matching_pursuit, "an encoder to centre", ("centre_pre_activations",)),
        (
            cfg.directions not in (Directions.mlp_response, Directions.neurons),
            "directions=random or active_subspace",
            ("tied",),
        ),
        (cfg.selects, "an activation function that takes k", ("k_start", "k_anneal", "scope")),
    ]
    initial = _defaults(type(cfg))
    for has_effect, condition, names in effects:
        for name in names:
            value = getattr(cfg, name)
            without = condition if condition.startswith(("a ", "an ")) else f"decomposition.{condition}"
            require(
                has_effect or value == initial[name],
                f"decomposition.{name}={_plain(value)} has no effect without {without}",
            )
    for on, name in (
        (cfg.penalty is not Penalty.none, "penalty"),
        (cfg.pre_activation_loss is not PreActivationLoss.none, "pre_activation_loss"),
        (cfg.end_to_end is not EndToEnd.none, "end_to_end"),
    ):
        coefficient = f"{name.removesuffix('_loss')}_coefficient"
        require(
            not on or getattr(cfg, coefficient) > 0,
            f"decomposition.{coefficient}={getattr(cfg, coefficient)} must be positive "
            f"with decomposition.{name}={_plain(getattr(cfg, name))}",
        )
    require(
        cfg.local_coefficient > 0 or cfg.end_to_end is not EndToEnd.none,
        "decomposition.local_coefficient=0 leaves nothing to learn from without decomposition.end_to_end",
    )


def check_ranges(cfg: Settings) -> None:
    for name in ("k_anneal", "penalty_warmup", "threshold_rate", "subspace_share"):
        require(0 <= getattr(cfg, name) <= 1, f"decomposition.{name}={getattr(cfg, name)} must lie between 0 and 1")
    for name in (
        *("penalty_coefficient", "aux_coefficient", "jumprelu_threshold", "gate_coefficient", "local_coefficient"),
        *("pre_activation_coefficient", "end_to_end_coefficient", "archetypal_slack", "threshold_lr"),
    ):
        require(getattr(cfg, name) >= 0, f"decomposition.{name}={getattr(cfg, name)} must not be negative")
    for name in (
        *("aux_k", "dead_after_tokens", "jumprelu_bandwidth", "penalty_scale", "penalty_frequency", "p_start", "p_end"),
        *("p_steps", "resample_every", "resample_scale", "archetypes", "initial_tokens", "subspace_share"),
    ):
        require(getattr(cfg, name) > 0, f"decomposition.{name}={getattr(cfg, name)} must be positive")
    require(cfg.p_end <= cfg.p_start, f"decomposition.p_end={cfg.p_end} must not exceed p_start={cfg.p_start}")
    require(
        len(cfg.p_anneal) == 2 and 0 <= cfg.p_anneal[0] <= cfg.p_anneal[1] <= 1,
        f"decomposition.p_anneal={cfg.p_anneal} must be two shares of training, e.g. [0.5, 1.0]",
    )
    require(
        len(cfg.mixed_weights) == 2 and min(cfg.mixed_weights) >= 0 and sum(cfg.mixed_weights) > 0,
        f"decomposition.mixed_weights={cfg.mixed_weights} must be two numbers, of sae and of crosscoder, e.g. [1.0, 0.1]",
    )
    require(
        cfg.penalty not in _OF_CODES
        or cfg.decoder is not Decoder.free
        or cfg.penalty_normalisation is not CodeNormalisation.none,
        f"decomposition.penalty={cfg.penalty.value} with a free decoder is won by small codes and large decoder rows; "
        "write penalty_normalisation=sae, or decoder=unit_norm",
    )
    require(
        cfg.pre_activation_loss is PreActivationLoss.none or not cfg.selects,
        f"decomposition.pre_activation_loss={cfg.pre_activation_loss.value} draws features up to a threshold, but "
        f"decomposition.activation={cfg.activation.value} has none while it is trained; write pre_activation_loss=none",
    )
    if cfg.matryoshka is not None:
        shares, weights = cfg.matryoshka, cfg.matryoshka_weights
        require(
            len(shares) > 0 and all(share > 0 for share in shares) and abs(sum(shares) - 1) < 1e-6,
            f"decomposition.matryoshka={shares} must be positive shares that add to 1",
        )
        for n in (n for n in [cfg.n_features, *(cfg.n_exclusive or [])] if n > 0):
            require(
                min(shares) * n >= 1,
                f"decomposition.matryoshka={shares} leaves a block of {n} features empty; "
                "write fewer or more even shares",
            )
        require(
            weights is None or (len(weights) == len(shares) and all(w >= 0 for w in weights) and sum(weights) > 0),
            f"decomposition.matryoshka_weights={weights} must be {len(shares)} numbers, one a prefix, or null",
        )
    for name in ("lr", "decoder_norm", "penalty_target"):
        value = getattr(cfg, name)
        require(value is None or value > 0, f"decomposition.{name}={value} must be positive, or null")
    require(
        cfg.betas is None or (len(cfg.betas) == 2 and all(0 <= b < 1 for b in cfg.betas)),
        f"decomposition.betas={cfg.betas} must be two numbers from 0 up to 1, or null",
    )


def check_decoder(cfg: Settings) -> None:
    """An archetypal decoder is computed from data: nothing else can write to it."""
    if cfg.decoder is not Decoder.archetypal:
        return
    for on, setting, right in (
        (cfg.dead is Dead.resample, "dead=resample", "dead=aux_k"),
        (cfg.directions is not Directions.random, f"directions={cfg.directions.value}", "directions=random"),
        (cfg.decoder_norm_search, "decoder_norm_search=true", "decoder_norm_search=false"),
    ):
        require(
            not on,
            f"decomposition.{setting} writes decoder rows, but those of decomposition.decoder=archetypal are mixtures "
            f"of data; write {right}",
        )
    require(
        cfg.archetypes <= cfg.initial_tokens,
        f"decomposition.archetypes={cfg.archetypes} must not exceed the rows they are taken from, "
        f"decomposition.initial_tokens={cfg.initial_tokens}",
    )


def check_baseline(cfg: Settings) -> None:
    """What is never trained keeps the k largest in size: of neurons, or of coefficients of directions."""
    name, activation = (
        cfg.architecture.value,
        Activation.topk if cfg.architecture is Architecture.neurons else Activation.abs_topk,
    )
    require(
        cfg.ranking is Ranking.activation or cfg.architecture is Architecture.neurons,
        f"decomposition.ranking={cfg.ranking.value} ranks neurons, but decomposition.architecture is {name}; leave it out",
    )
    require(
        not cfg.architecture.is_baseline or cfg.activation is activation,
        f"decomposition.architecture={name} keeps k a token, so decomposition.activation={cfg.activation.value} has no "
        f"meaning for it; write activation={activation.value}",
    )


def _weighs_codes(cfg: Settings) -> bool:
    """Whether penalty_normalisation changes anything."""
    of_z = cfg.pre_activation_loss is not PreActivationLoss.none and cfg.code_normalisation is CodeNormalisation.none
    return cfg.penalty in _OF_CODES or of_z


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _defaults(of: type) -> dict[str, Any]:
    """What each setting is where nothing is said."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in fields(of)
    }
