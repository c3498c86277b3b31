"""From the word in the settings to the activation function."""

from nndecomp.config.schema import Activation
from nndecomp.decompositions.activation_base import ActivationFunction
from nndecomp.decompositions.activation_pointwise import Gated, JumpRelu, Relu
from nndecomp.decompositions.activation_selecting import AbsTopK, BatchTopK, TopK
from nndecomp.decompositions.pursuit import MatchingPursuit
from nndecomp.decompositions.spec import DictionarySpec


def make_activation(whole: DictionarySpec) -> ActivationFunction:
    spec, n_features = whole.activation, [group.n_features for group in whole.groups]
    match spec.kind:
        case Activation.relu:
            return Relu(n_features)
        case Activation.gated:
            return Gated(n_features)
        case Activation.topk:
            return TopK(spec.k, spec.scope)
        case Activation.abs_topk:
            return AbsTopK(spec.k, spec.scope)
        case Activation.batchtopk:
            return BatchTopK(spec.k, spec.scope, spec.threshold_rate)
        case Activation.jumprelu:
            return JumpRelu(n_features, spec.initial_threshold, spec.bandwidth, spec.gradient, spec.log_threshold)
        case Activation.matching_pursuit:
            return MatchingPursuit(spec.k, whole.write_layout.width)
