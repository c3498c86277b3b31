"""exp_030: the rows of activations that a sweep trains on, written once to be read by all of its runs.

python experiments/exp_030_write_activation_store/run.py
python experiments/exp_030_write_activation_store/run.py +scale=tiny   # the model that ships: a minute on a CPU

Writes training.n_tokens rows of every site that `decomposition` (or `compare`) reads or writes to <out>/store. Killed,
it goes on where it stopped when it is started in the same directory (hydra.run.dir=...).
"""

from pathlib import Path

from nndecomp.config.schema import ActivationsKind, RunConfig, require
from nndecomp.run import experiment


@experiment("exp_030_write_activation_store")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.activations.manifest import row_settings
    from nndecomp.activations.store import open_store, verify
    from nndecomp.activations.store_writer import write_store
    from nndecomp.decompositions.architectures import wire
    from nndecomp.training.progress import Progress

    require(
        cfg.activations.kind is ActivationsKind.live,
        f"activations.kind={cfg.activations.kind.value} reads a store; writing one needs activations=live",
    )
    target = build.target(cfg)
    groups = [group for each in build.decompositions(cfg).values() for group in wire(each, target.shape).groups]
    harvester = build.harvester(cfg, target, sorted({site for g in groups for site in (*g.reads, *g.writes)}))
    settings = row_settings(cfg.target, cfg.paired_target, cfg.tokens, cfg.activations, target.tokenizer)
    n_rows = cfg.training.n_tokens
    with Progress("store", n_rows, 0) as bar:
        write_store(
            harvester,
            out / "store",
            settings,
            n_rows=n_rows,
            seed=cfg.seed,
            progress=lambda n_written: bar.advance(n_written - bar.done),
        )
    store = open_store(out / "store")
    verify(store)
    print(f"{store.n_rows} rows of {', '.join(map(str, store.layout.sites))}; to train on them:")
    print(f"activations=store activations.dtype={cfg.activations.dtype.value} activations.store={out / 'store'}")
    return {"n_rows": store.n_rows, "bytes": sum(shard.bytes for shard in store.manifest.shards)}


if __name__ == "__main__":
    main()
