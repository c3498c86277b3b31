"""The words of `decomposition`: each member's name is what one writes in YAML and on the command line."""

from enum import Enum


class Architecture(Enum):
    sae = "sae"  # one site, written back to itself
    per_layer_sae = "per_layer_sae"  # one sae a layer
    transcoder = "transcoder"  # mlp_in of one layer -> its mlp_out
    per_layer_transcoder = "per_layer_transcoder"  # one transcoder a layer
    cross_layer_transcoder = "cross_layer_transcoder"  # mlp_in of layer l -> mlp_out of layers l, l+1, ...
    crosscoder = "crosscoder"  # all sites -> all sites: layers of one model, or two models side by side
    causal_crosscoder = "causal_crosscoder"  # site of layer l -> itself and the same point of all later layers
    dedicated_feature_crosscoder = "dedicated_feature_crosscoder"  # features of A alone, of both models, of B alone
    molt = "molt"  # mixture of sparse low-rank linear transforms, one mixture a layer
    lorsa = "lorsa"  # low-rank sparse attention: rank-1 heads in place of attention
    # Baselines, never trained:
    neurons = "neurons"  # the MLPs' own neurons, of which k are kept, the first in `ranking`
    principal_directions = "principal_directions"  # of what is written: the k largest coefficients kept
    random_directions = "random_directions"  # the same, of random orthonormal directions

    @property
    def is_baseline(self) -> bool:
        return self in (Architecture.neurons, Architecture.principal_directions, Architecture.random_directions)


class BackendKind(Enum):
    """What computes selection, gathers and segment sums of sparse codes; see `nndecomp.decompositions.backends`."""

    auto = "auto"  # native on the CPU where it can be compiled, triton on CUDA where it is installed, else torch
    torch = "torch"
    native = "native"
    native_int8 = (
        "native_int8"  # native, with bounds of 8 bits that hold very likely, checked: faster still where the CPU is
    )
    triton = "triton"


class Ranking(Enum):
    """By what each token's neurons are ranked; h is a neuron's activation."""

    activation = "activation"  # |h|
    output_norm = "output_norm"  # |h| times the norm of what the neuron writes
    attribution = (
        "attribution"  # |h dL/dh|, L the target's own loss on the text, averaged on the way from silent neurons
    )


class Activation(Enum):
    relu = "relu"
    gated = "gated"  # a gate decides what is active, a second branch how much
    topk = "topk"
    abs_topk = "abs_topk"  # the k largest in absolute value, signs kept
    batchtopk = "batchtopk"
    jumprelu = "jumprelu"
    matching_pursuit = "matching_pursuit"  # k features by pursuing the residual; only for what writes what it reads


class Scope(Enum):
    group = "group"  # features compete within their group (their layer, their model)
    all = "all"  # features of all groups compete: k is still per group on average


class Encoder(Enum):
    linear = "linear"
    glu = "glu"  # (x W_enc + b_enc) * sigmoid(x W_glu + b_glu)


class CodeNormalisation(Enum):
    """c of a feature whose decoder has norm n_s at each site s it writes."""

    none = "none"  # 1
    sae = "sae"  # sqrt(sum n_s^2), the norm of the whole decoder row
    crosscoder = "crosscoder"  # sum n_s
    mixed = "mixed"  # mixed_weights[0] * sae + mixed_weights[1] * crosscoder
    decoupled = "decoupled"  # n_s, at each site on its own: a feature may be active at one and not at another


class JumpReluGradient(Enum):
    """What reaches pre-activations through z * 1[z > theta]; the threshold always learns through the rectangle."""

    exact = "exact"  # 1[z > theta]
    rectangle = "rectangle"  # the same, and theta / bandwidth within half a bandwidth of theta
    positive = "positive"  # 1[z > 0]


class Reconstruction(Enum):
    sum_of_squares = "sum_of_squares"  # mean over tokens of |y - y_hat|^2
    mean_of_squares = "mean_of_squares"  # mean over tokens and coordinates
    norm = "norm"  # mean over tokens and written sites of |y - y_hat|
    normalised = "normalised"  # mean over written sites of |y - y_hat|^2 / variance of the site in the batch


class Penalty(Enum):
    """Of f c, with c as `penalty_normalisation` says; mean over tokens, sum over features."""

    none = "none"
    l1 = "l1"
    tanh = "tanh"  # tanh(s f c), s = penalty_scale
    tanh_quadratic = "tanh_quadratic"  # p (1 + p / penalty_frequency), p = mean over tokens of tanh(s f c)
    lp = "lp"  # (f c)^p, p annealed from p_start to p_end; the coefficient follows, so that the product does not jump
    l0 = "l0"  # straight-through count; needs jumprelu
    l0_target = "l0_target"  # (l0 / penalty_target - 1)^2 of each group, l0 straight through; needs jumprelu


class PreActivationLoss(Enum):
    """Sum over features; a is c of code_normalisation, and where that is none, b is c of penalty_normalisation, else 1."""

    none = "none"
    threshold = "threshold"  # relu(theta - z a) b; theta = 0 for all but jumprelu
    dead = "dead"  # the same, of dead features alone


class EndToEnd(Enum):
    none = "none"
    kl = "kl"  # KL(target || target with the reconstructions in place)
    ce = "ce"  # next-token cross-entropy with the reconstructions in place


class Together(Enum):
    all = "all"  # every written site replaced at once, reads taken inside the patched run
    single = "single"  # one written site at a time, drawn anew each step


class Dead(Enum):
    """What revives features that have not fired for `dead_after_tokens`."""

    none = "none"
    aux_k = "aux_k"  # they reconstruct what the others left over (Gao et al. 2024)
    ghost = "ghost"  # they do so by the exponential of their pre-activations (Anthropic, January 2024)
    resample = "resample"  # they start anew at inputs that are badly reconstructed (Bricken et al. 2023)


class Directions(Enum):
    """Where decoder rows start."""

    random = "random"
    active_subspace = "active_subspace"  # random within the leading principal directions of what is written
    mlp_response = "mlp_response"  # what the target's own MLP answers to the feature's encoder direction
    heads = "heads"  # lorsa: what the target's own heads read and write, along leading directions of their values
    # The MLP's own neurons: what they read, and what they write, as loud as they do unless decoder_norm is given; further
    # features are random.
    neurons = "neurons"


class InitialBias(Enum):
    """Where b_dec starts."""

    zero = "zero"
    mean = "mean"
    geometric_median = "geometric_median"


class AttentionStart(Enum):
    """Where the queries and keys of lorsa start."""

    random = "random"
    target = "target"  # those of the target's own heads, each as often as heads are asked for


class Decoder(Enum):
    free = "free"
    unit_norm = "unit_norm"  # rows of norm 1; the gradient along them is taken away
    archetypal = "archetypal"  # rows near the convex hull of data (Fel et al. 2025)
