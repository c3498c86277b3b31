"""Activations out of a model and out of a store, beside what neither can do without.

harvest   all MLPs' inputs and outputs up to a layer (`Harvester`), beside the same layers run bare, on the same tokens
store     batches of its shuffled stream, beside a copy of as many bytes, and the same rows out of numpy's memmap
waiting   share of training's time that is lost to waiting for rows, as the log has it
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nndecomp.activations.harvest import Harvester
from nndecomp.activations.manifest import row_settings
from nndecomp.activations.store import Store, open_store
from nndecomp.activations.store_writer import write_store
from nndecomp.activations.stream import StoreStream
from nndecomp.build.data import target as target_of
from nndecomp.build.throughput import asked
from nndecomp.build.throughput_worker import CPU, size_of, timed
from nndecomp.build.training import trained
from nndecomp.config.schema import RunConfig, require
from nndecomp.config.throughput import OWN
from nndecomp.evaluation.timing import Speed
from nndecomp.targets.base import Target
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig
from nndecomp.targets.llama_simple_mlp_target import LlamaSimpleMLPTarget
from nndecomp.tokens.random_ids import RandomTokens
from nndecomp.types import Point, Site

N_VOCAB = 512
STORED = 2**15  # rows at most


def speeds(cfg: RunConfig, out: Path) -> list[Speed]:
    """In turn within each group. Writes a store and a trained dictionary below `out`."""
    throughput = asked(cfg)
    target = target_of(cfg)
    require(
        isinstance(target, LlamaSimpleMLPTarget),
        f"target.path={cfg.target.path} is run bare only where it is a LlamaSimpleMLP; write target=tiny",
    )
    assert isinstance(target, LlamaSimpleMLPTarget)
    last = max(cfg.decomposition.layers or [target.shape.of(None).n_layers - 1])
    found = []
    for name in throughput.at:
        model = cut(target.model, last + 1) if name == OWN else drawn(cfg, name).to(target.device)
        found += harvest(cfg, LlamaSimpleMLPTarget(name, model, None), throughput.rounds)
    found += stored(cfg, target, out / "store", throughput.rounds)
    return found


def cut(model: LlamaSimpleMLP, n_layers: int) -> LlamaSimpleMLP:
    """The same, without later layers."""
    shorter = copy.deepcopy(model)
    shorter.h = nn.ModuleList(list(shorter.h)[:n_layers])
    shorter.config = replace(model.config, n_layers=n_layers)
    return shorter


def drawn(cfg: RunConfig, name: str) -> LlamaSimpleMLP:
    size = size_of(cfg, name)
    n_heads = max(1, size.d_model // 64)
    config = LlamaSimpleMLPConfig(
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_mlp=4 * size.d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        n_ctx=cfg.tokens.seq_len,
        n_vocab=N_VOCAB,
    )
    return LlamaSimpleMLP(config, torch.Generator().manual_seed(cfg.seed))


def harvest(cfg: RunConfig, target: LlamaSimpleMLPTarget, rounds: int) -> list[Speed]:
    shape, seq_len = target.shape.of(None), cfg.tokens.seq_len
    sites = [Site(layer, point) for layer in range(shape.n_layers) for point in (Point.mlp_in, Point.mlp_out)]
    n_seqs = (
        cfg.activations.batch_seqs if target.name == OWN else max(1, size_of(cfg, target.name).batch_tokens // seq_len)
    )
    activations = replace(cfg.activations, batch_seqs=n_seqs, drop_bos=False)
    read = Harvester(target, RandomTokens(shape.n_vocab, seq_len, cfg.seed), sites, activations, seq_len=seq_len)
    same = RandomTokens(shape.n_vocab, seq_len, cfg.seed)

    def bare() -> None:
        tokens = same.next_batch(n_seqs).tokens.to(target.device)
        with torch.inference_mode():
            target.model.residual(tokens)

    group = f"{shape.n_layers} layers of d {shape.d_model}, {len(sites)} sites"
    return in_turn(
        group, {"bare model": bare, "harvest": read.next_rows}, n_seqs * seq_len, "tokens", rounds, target.device
    )


def stored(cfg: RunConfig, target: Target, directory: Path, rounds: int) -> list[Speed]:
    """Rows of all MLPs' inputs and outputs in fp32, read once before they are timed: out of the page cache. Nobody reads what a turn
    before has left in the processor's own, which the stream cannot either."""
    shape, seq_len = target.shape.of(None), cfg.tokens.seq_len
    sites = [Site(layer, point) for layer in range(shape.n_layers) for point in (Point.mlp_in, Point.mlp_out)]
    tokens = RandomTokens(shape.n_vocab, seq_len, cfg.seed)
    read = Harvester(target, tokens, sites, cfg.activations, seq_len=seq_len)
    settings = row_settings(cfg.target, None, cfg.tokens, cfg.activations, target.tokenizer)
    n_rows = min(STORED, 16 * cfg.training.n_tokens)
    write_store(read, directory, settings, n_rows=n_rows, seed=cfg.seed)
    store = open_store(directory)
    batch = cfg.training.batch_tokens
    stream = StoreStream(store, batch, cfg.seed, cfg.activations.buffer_tokens, torch.device("cpu"))
    mapped = memory_map(store)
    everything = store.gather(torch.arange(store.n_rows))
    there = torch.empty(batch, store.layout.width)
    copied = cycle(everything.split(batch)[: store.n_rows // batch])
    drawn_rows, mapped_rows = evenly(store.n_rows, batch, cfg.seed), evenly(store.n_rows, batch, cfg.seed + 1)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: there.copy_(next(copied)),
        "shuffled stream": stream.next_batch,
        "the same, rows drawn evenly": lambda: store.gather(torch.from_numpy(next(drawn_rows))),
        "numpy memmap, rows drawn evenly": lambda: mapped[next(mapped_rows)],
    }
    amount = there.numel() * there.element_size()
    return in_turn(f"store, rows of {4 * store.layout.width:,} bytes", runs, amount, "bytes", rounds)


def evenly(n_rows: int, batch: int, seed: int) -> Iterator["np.ndarray"]:
    """Positions of batches, each in order, that have no row in common until all are used."""
    order = np.random.default_rng(seed).permutation(n_rows)[: n_rows // batch * batch]
    return cycle(np.sort(order.reshape(-1, batch), 1))


def memory_map(store: Store) -> "np.memmap":
    (shard,) = store.manifest.shards
    shape = (shard.rows, store.layout.width)
    return np.memmap(store.directory / shard.file, np.float32, "r", store.manifest.rows_offset, shape)


def in_turn(
    group: str,
    runs: Mapping[str, Callable[[], object]],
    amount: int,
    unit: str,
    rounds: int,
    device: torch.device = CPU,
) -> list[Speed]:
    """Each once a round, forwards and backwards; the first rounds, which fill caches, are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        order = dict(list(runs.items())[:: 1 if number % 2 == 0 else -1])
        for name, wall in timed(order, device)["wall"].items():
            seconds[name].append(wall)
    return [Speed(group, name, amount, unit, wall[2:]) for name, wall in seconds.items()]


def waiting(cfg: RunConfig, out: Path) -> float:
    """Share of the time of a real run, after the stretch in which its buffer is filled."""
    trained(cfg, target_of(cfg), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    laps = [row["timing"] for row in rows if "timing" in row][1:] or [rows[0]["timing"]]
    return sum(lap["waiting_share"] * lap["seconds"] for lap in laps) / sum(lap["seconds"] for lap in laps)
