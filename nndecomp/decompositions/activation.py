"""From the word in the settings to the activation function."""

from collections.abc import Sequence

from nndecomp.config.schema import Activation
from nndecomp.decompositions.activation_base import Pointwise, Selecting
from nndecomp.decompositions.activation_pointwise import JumpRelu, Relu
from nndecomp.decompositions.activation_selecting import BatchTopK, TopK
from nndecomp.decompositions.spec import ActivationSpec


def make_activation(spec: ActivationSpec, n_features: Sequence[int]) -> Selecting | Pointwise:
    match spec.kind:
        case Activation.relu:
            return Relu()
        case Activation.topk:
            return TopK(spec.k, spec.scope)
        case Activation.batchtopk:
            return BatchTopK(spec.k, spec.scope, spec.threshold_rate)
        case Activation.jumprelu:
            return JumpRelu(n_features, spec.initial_threshold, spec.bandwidth)
        case other:
            raise NotImplementedError(f"activation {other.value}")
