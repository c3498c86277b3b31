"""From a trained dictionary to another one that computes the same, or nearly so, in another form.

All take dictionaries in the units of training or folded ones alike: thresholds compare z c, which folding does not change.
"""

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences
from nndecomp.config.schema import Activation, CodeNormalisation, Scope, require
from nndecomp.decompositions.activation_pointwise import Gated, JumpRelu
from nndecomp.decompositions.activation_selecting import BatchTopK, TopK
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import ActivationSpec


@torch.no_grad()
def to_jumprelu(dictionary: SparseDictionary, x: RowsOrSequences | None = None) -> SparseDictionary:
    """Of batchtopk with its inference threshold: exact. Of topk: with the threshold, one a group (or one for all that
    compete), that keeps as many features of the rows `x` as topk does; which ones, on each token, may differ."""
    activation, n_groups = dictionary.activation, len(dictionary.groups)
    match activation:
        case BatchTopK(threshold=threshold):
            require(not bool(threshold.isnan().any()), "batchtopk has no inference threshold yet; train it first")
            thresholds = threshold.expand(n_groups)
        case TopK(signed=False):
            require(x is not None and len(x) > 0, "x holds no rows; topk needs some to count active features on")
            assert x is not None, "checked above"
            thresholds = _calibrated(dictionary, x, activation.scope)
        case other:
            name = dictionary.spec.activation.kind.value
            require(False, f"activation={name} does not become jumprelu; batchtopk does, and topk")
            raise AssertionError(f"{type(other).__name__} was refused")
    made = _with_activation(dictionary, replace(dictionary.spec.activation, kind=Activation.jumprelu, k=()))
    assert isinstance(made.activation, JumpRelu), "as asked for"
    for g, bank in enumerate(made.banks):
        made.activation.set_theta(g, thresholds[g].expand(bank.n_features))
    return made


def _calibrated(dictionary: SparseDictionary, x: RowsOrSequences, scope: Scope) -> Float[Tensor, "group"]:
    """Halfway between the last score that is kept and the first that is not."""
    scores, counts = [], dictionary.encode(x).counts().sum(0)
    for g, bank in enumerate(dictionary.banks):
        pre, c = bank.pre_activations(dictionary.read(x, g)), dictionary.scale(g)
        scores.append((pre if c is None else pre * c).flatten())
    if scope is Scope.all:
        return _between(torch.cat(scores), int(counts.sum())).expand(len(scores))
    return torch.stack([_between(own, int(n)) for own, n in zip(scores, counts, strict=True)])


def _between(scores: Float[Tensor, "entry"], n: int) -> Float[Tensor, ""]:
    """A positive threshold that n scores exceed."""
    ranked = scores.sort(descending=True).values
    above = ranked[n - 1] if n > 0 else ranked[0] + 1
    return (above + ranked[n].clamp_min(0)) / 2 if n < len(ranked) else above / 2


def _with_activation(dictionary: SparseDictionary, activation: ActivationSpec) -> SparseDictionary:
    """The same weights under another activation function, which starts anew."""
    made = SparseDictionary(replace(dictionary.spec, activation=activation)).to(dictionary.b_dec)
    own = {name: tensor for name, tensor in dictionary.state_dict().items() if not name.startswith("activation.")}
    fresh = {name: tensor for name, tensor in made.state_dict().items() if name.startswith("activation.")}
    made.load_state_dict({name: tensor for name, tensor in own.items() if name in made.state_dict()} | fresh)
    return made.eval()


_RANKED = (Activation.relu, Activation.topk, Activation.batchtopk, Activation.jumprelu)


def topk_obstacle(dictionary: SparseDictionary, k: int) -> str | None:
    """Why the k largest features of each token and group cannot take the place of its own selection, or None if they can."""
    spec, smallest = dictionary.spec, min(group.n_features for group in dictionary.spec.groups)
    if spec.activation.kind not in _RANKED:
        return f"activation={spec.activation.kind.value} does not rank features by one number"
    if k > smallest:
        return f"its smallest group has {smallest} features"
    return None


def is_own_topk(dictionary: SparseDictionary, k: int) -> bool:
    """Whether the k largest features of each token and group are its own selection."""
    own = dictionary.spec.activation
    return own.kind is Activation.topk and set(own.k) == {k} and own.scope is Scope.group


def to_topk(dictionary: SparseDictionary, k: int) -> SparseDictionary:
    """The same weights, each token keeping the k largest features of each group, whatever the activation function selected:
    one trained dictionary at any sparsity."""
    obstacle = topk_obstacle(dictionary, k)
    require(obstacle is None, f"k={k} features of each group cannot be asked for: {obstacle}")
    spec = replace(dictionary.spec.activation, kind=Activation.topk, k=(k,) * len(dictionary.groups), scope=Scope.group)
    return _with_activation(dictionary, spec)


def pursuit_obstacle(dictionary: SparseDictionary) -> str | None:
    """Why a pursuit cannot encode for a dictionary, or None if it can."""
    spec = dictionary.spec
    if spec.read_layout != spec.write_layout:
        return "pursuit is for dictionaries that write what they read, and this one does not"
    if any(group.encoder is not None for group in spec.groups):
        return "pursuit is for dictionaries whose features are of one group each, and decoupled ones are of several"
    if spec.activation.kind is Activation.matching_pursuit:
        return "this dictionary pursues already"
    return None


def to_pursuit(dictionary: SparseDictionary, k: int) -> SparseDictionary:
    """The same decoder, its codes found by gradient pursuit: k features a group. For what writes what it reads.

    Errors are measured in the units that the dictionary is in: of raw activations, where it has been folded.
    """
    spec, obstacle = dictionary.spec, pursuit_obstacle(dictionary)
    require(obstacle is None, str(obstacle))
    sizes = [group.n_features for group in spec.groups]
    require(0 < k <= min(sizes), f"k={k} is not between 1 and the {min(sizes)} features of the smallest group")
    kind = ActivationSpec(Activation.matching_pursuit, k=(k,) * len(sizes))
    spec = replace(spec, activation=kind, centre_input=False, frozen_scales=False)
    made = SparseDictionary(spec).to(dictionary.b_dec)
    weights = dictionary.state_dict()
    activation = {name: tensor for name, tensor in made.state_dict().items() if name.startswith("activation.")}
    made.load_state_dict({name: weights.get(name, tensor) for name, tensor in made.state_dict().items()} | activation)
    return made.eval()


@torch.no_grad()
def with_unit_norm_decoder(dictionary: SparseDictionary) -> SparseDictionary:
    """The same function with decoder rows of norm 1 (transforms of Frobenius norm 1), and codes as much larger; zeros stay.

    f' = f |d|: W_enc, b_enc (gated: b_mag as well) times |d|. c is divided by it and kept, so that z c, which selection and
    thresholds see, is what it was.
    """
    require(
        all(group.encoder is None for group in dictionary.spec.groups),
        "decoupled groups share an encoder, and cannot all have decoder rows of norm 1",
    )
    made = copy.deepcopy(dictionary)
    ranks = not isinstance(made.activation, Gated) and made.spec.activation.kind is not Activation.relu
    if ranks or made.spec.activation.code_normalisation is not CodeNormalisation.none:
        made.freeze_scales()
    for g, bank in enumerate(made.banks):
        norms = bank.scale(CodeNormalisation.sae, (1.0, 0.0))
        norms = torch.where(norms > 1e-15, norms, 1)
        bank.divide_decoder(norms)
        if bank.own_encoder is not None:
            bank.own_encoder.W_enc.mul_(norms[:, None])
            bank.own_encoder.b_enc.mul_(norms)
        if isinstance(made.activation, Gated):
            made.activation.b_mag[g].mul_(norms)
        if bank.code_scale is not None:
            bank.code_scale.div_(norms)
    return made
