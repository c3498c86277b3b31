"""Whether every backend learns and selects as dense products and autograd do, on synthetic rows and on the target's own."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from nndecomp.build.data import scales, stream
from nndecomp.build.data import target as target_of
from nndecomp.build.settings import decomposed_sites, device
from nndecomp.build.throughput import asked, chosen
from nndecomp.build.throughput_steps import configured, objective, rows
from nndecomp.build.throughput_systems import System, systems
from nndecomp.build.throughput_worker import size_of
from nndecomp.config.schema import Activation, BackendKind, RunConfig, SizeConfig, require
from nndecomp.decompositions import backends
from nndecomp.decompositions.units import Columns
from nndecomp.evaluation.agreement import Agreement, agreement, dense_losses

logger = logging.getLogger(__name__)
Batches = Sequence[Float[Tensor, "token width"]]


def agreements(cfg: RunConfig) -> list[Agreement]:
    """Of this library's systems, over all steps of `training`, from the same weights."""
    where = device(cfg)
    by_activation: dict[Activation, list[System]] = {}
    for name in chosen(asked(cfg), where):
        by_activation.setdefault(systems()[name].activation, []).append(systems()[name])
    found = []
    for origin, size, batches in _rows(cfg):
        named = origin if size.n_layers == 1 else f"{origin}, {size.n_layers} layers"
        training = replace(
            cfg.training, n_tokens=cfg.training.n_steps * size.batch_tokens, batch_tokens=size.batch_tokens
        )
        for activation, own in by_activation.items():
            if activation is Activation.jumprelu and size.n_layers > 1:
                continue  # its thresholds are started for one group
            settings = configured(cfg.decomposition, own[0], size)
            made = objective(settings, size, batches[0], cfg.seed).to(where)
            there = [batch.to(where) for batch in batches]
            dense = dense_losses(made, there, training), dense_losses(made, there, training, reverse=True)
            for system in own:
                logger.info("%s, %s: %d steps of %s", origin, size, training.n_steps, system.subject)
                with backends.using(BackendKind(system.backend)):
                    own_made = copy.deepcopy(made)
                    found.append(agreement(own_made, there, training, dense, named, str(system.backend)))
    return found


def _rows(cfg: RunConfig) -> Iterator[tuple[str, SizeConfig, Batches]]:
    """Synthetic ones of every size, then the target's own where the settings decompose it."""
    throughput = asked(cfg)
    for name in throughput.at:
        size = size_of(cfg, name)
        yield "synthetic", size, rows(size, throughput.n_batches, cfg.seed)
    target = target_of(cfg)
    (site, *more) = decomposed_sites(cfg, target.shape)
    require(
        not more,
        f"decomposition reads and writes {site}, {', '.join(map(str, more))}; write one layer and decomposition=sae",
    )
    read = stream(cfg, target, [site])
    normalised = Columns(read.layout, read.layout, scales(cfg, target, [site])).cpu()
    batches = [normalised(read.next_batch().cpu()) for _ in range(throughput.n_batches)]
    size = replace(size_of(cfg, throughput.at[0]), d_model=read.layout.width)
    yield f"{target.name} {site}", size, batches
