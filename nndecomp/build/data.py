"""Settings -> target, tokens and rows of activations."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.ahead import Ahead, can_run_ahead
from nndecomp.activations.buffer import RowSource, ShuffleBuffer
from nndecomp.activations.first_rows import FirstRows
from nndecomp.activations.harvest import Harvester
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.sequences import SequenceBuffer, Sequences
from nndecomp.activations.statistics import SiteScale, measure, normalisation
from nndecomp.activations.store import Store, open_store, verify
from nndecomp.activations.stream import RowStream, StoreStream
from nndecomp.activations.synthetic import SyntheticStream, World
from nndecomp.build.settings import device
from nndecomp.config.schema import (
    ActivationsKind,
    Normalisation,
    RunConfig,
)
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.targets.pair import load_pair
from nndecomp.tokens import open_tokens
from nndecomp.types import Site


def target(cfg: RunConfig) -> Target:
    """The model under study, or both of them."""
    if cfg.paired_target is None:
        return load_target(cfg.target, device(cfg))
    return load_pair(cfg.target, cfg.paired_target, device(cfg))


def harvester(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> Harvester:
    """Rows at `sites` over the training split, from its start."""
    tokens = open_tokens(cfg.tokens, target.tokenizer, cfg.seed)
    return Harvester(target, tokens, sites, cfg.activations, seq_len=cfg.tokens.seq_len)


def synthetic(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> World:
    """The features that rows at `sites` are drawn from."""
    assert cfg.activations.synthetic is not None, f"activations.kind={cfg.activations.kind.value} has no known features"
    return World(cfg.activations.synthetic, target.shape, sites)


def first_rows(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> FirstRows | None:
    """What all who read the training split from its start have in common, where that takes passes of the target."""
    if cfg.activations.kind is not ActivationsKind.live:
        return None
    apart = target.twin()  # training's passes may run while the target is used for something else
    return FirstRows(lambda wanted: harvester(cfg, apart, wanted), sites)


def source(cfg: RunConfig, target: Target, sites: Sequence[Site], first: FirstRows | None = None) -> RowSource:
    """Rows of the training split from its start, as they come: what looks at rows before training looks at."""
    if cfg.activations.kind is ActivationsKind.synthetic:
        n_rows = cfg.activations.batch_seqs * cfg.tokens.seq_len
        return SyntheticStream(synthetic(cfg, target, sites), n_rows, cfg.seed, target.device)
    return harvester(cfg, target, sites) if first is None else first.reader(sites)


def shuffled_sequences(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> SequenceBuffer:
    """Batches of training.batch_tokens positions in whole sequences, shuffled."""
    read = harvester(cfg, target, sites)
    return SequenceBuffer(read, cfg.activations.buffer_tokens, cfg.training.batch_tokens, cfg.seed)


def initial_sequences(cfg: RunConfig, target: Target, sites: Sequence[Site], n: int) -> Sequences:
    """At least `n` positions to start from, out of twice as many or more, in whole sequences."""
    seq_len, one_pass = cfg.tokens.seq_len, cfg.activations.batch_seqs * cfg.tokens.seq_len
    whole = -(-n // seq_len) * seq_len
    read = harvester(cfg, target, sites)
    return SequenceBuffer(read, max(2 * whole, whole + one_pass), whole, cfg.seed).next_batch()


def stream(cfg: RunConfig, target: Target, sites: Sequence[Site], first: FirstRows | None = None) -> RowStream:
    """Batches of training.batch_tokens shuffled rows at `sites`; the target's next pass runs ahead where there is room."""
    batch_tokens, buffer_tokens = cfg.training.batch_tokens, cfg.activations.buffer_tokens
    if cfg.activations.kind is not ActivationsKind.live:
        return _drawn(cfg, target, sites, batch_tokens, buffer_tokens)
    first = first_rows(cfg, target, sites) if first is None else first
    assert first is not None, "rows of a live target are harvested"
    read = first.reader(sites)
    return ShuffleBuffer(Ahead(read) if can_run_ahead(read.device) else read, buffer_tokens, batch_tokens, cfg.seed)


def _drawn(cfg: RunConfig, target: Target, sites: Sequence[Site], batch_tokens: int, window_tokens: int) -> RowStream:
    """From a store, or out of nothing."""
    if cfg.activations.kind is ActivationsKind.synthetic:
        return SyntheticStream(synthetic(cfg, target, sites), batch_tokens, cfg.seed, target.device)
    return StoreStream(store(cfg, target, sites), batch_tokens, cfg.seed, window_tokens, target.device)


def initial_rows(
    cfg: RunConfig, target: Target, sites: Sequence[Site], n: int, first: FirstRows | None = None
) -> Float[Tensor, "token width"]:
    """`n` rows to start from, out of twice as many or more. What training reads is not touched: it begins at the start."""
    one_pass = cfg.activations.batch_seqs * cfg.tokens.seq_len
    capacity = max(2 * n, n + one_pass)
    if cfg.activations.kind is not ActivationsKind.live:
        return _drawn(cfg, target, sites, n, capacity).next_batch()
    return ShuffleBuffer(source(cfg, target, sites, first), capacity, n, cfg.seed).next_batch()


def store(cfg: RunConfig, target: Target, sites: Sequence[Site]) -> Store:
    """The store of `activations`, refused if it holds rows of another model, text or other sites."""
    settings = row_settings(cfg.target, cfg.paired_target, cfg.tokens, cfg.activations, target.tokenizer)
    opened = open_store(Path(str(cfg.activations.store)), sites, settings)
    opened.check_target(target)
    if cfg.activations.verify:
        verify(opened)
    return opened


def scales(
    cfg: RunConfig, target: Target, sites: Sequence[Site], first: FirstRows | None = None
) -> dict[Site, SiteScale]:
    """How each site's rows are normalised for training; folded into the weights afterwards."""
    kind = cfg.activations.normalisation
    match cfg.activations.kind:
        case _ if kind is Normalisation.none:
            return dict.fromkeys(sites, 1.0)
        case ActivationsKind.store:
            stored = store(cfg, target, sites)
            return normalisation(stored.statistics, stored.layout, kind)
        case ActivationsKind.live | ActivationsKind.synthetic:
            rows = source(cfg, target, sites, first)
            return normalisation(measure(rows, cfg.activations.normalisation_tokens), rows.layout, kind)
