"""From settings to a dictionary: its spec, and its first weights."""

import torch

from nndecomp.config.schema import Architecture, DecompositionConfig, Scope
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.initial import compare_fairly, initial_decoder_norm, randomise
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Shape


def dictionary_spec(cfg: DecompositionConfig, shape: Shape, target: str) -> DictionarySpec:
    """What `build_dictionary` builds; raises SettingError as `wire` does."""
    assert not cfg.architecture.is_baseline, f"{cfg.architecture.value} is never trained"
    wiring = wire(cfg, shape)
    return DictionarySpec(
        architecture=cfg.architecture.value,
        target=target,
        widths=wiring.widths,
        groups=wiring.groups,
        activation=ActivationSpec(
            kind=cfg.activation,
            scope=cfg.scope,
            k=wiring.k,
            threshold_rate=cfg.threshold_rate,
            initial_threshold=cfg.jumprelu_threshold,
            bandwidth=cfg.jumprelu_bandwidth,
            gradient=cfg.jumprelu_gradient,
            log_threshold=cfg.jumprelu_log_threshold,
            code_normalisation=cfg.code_normalisation,
            mixed_weights=(cfg.mixed_weights[0], cfg.mixed_weights[1]),
        ),
        encoder=cfg.encoder,
        skip=cfg.skip,
        centre_input=cfg.centre_input,
    )


def build_dictionary(
    cfg: DecompositionConfig, shape: Shape, seed: int, device: torch.device, target: str
) -> SparseDictionary:
    """An initialised dictionary, to be trained. `target` is the name of the model it will be trained on.

    Raises SettingError as `wire` does.
    """
    dictionary = SparseDictionary(dictionary_spec(cfg, shape, target))
    randomise(dictionary, seed, initial_decoder_norm(cfg), cfg.tied)
    if cfg.architecture is Architecture.dedicated_feature_crosscoder and not (cfg.selects and cfg.scope is Scope.group):
        compare_fairly(dictionary)
    return dictionary.to(device)
