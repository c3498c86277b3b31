"""Whether settings of a parameter decomposition fit the run."""

from nndecomp.config.schema import ActivationsKind, Packing, RunConfig, TargetKind, require
from nndecomp.config.spd import ImportanceKind, SourceScope


def check_parameters(cfg: RunConfig) -> None:
    """SettingError unless batches of whole sequences can be had, and fit what is trained on them."""
    spd = cfg.spd
    if spd is None:
        return
    require(
        cfg.paired_target is None,
        "spd takes one model apart, but paired_target names a second; write paired_target=null",
    )
    require(
        cfg.target.kind not in (TargetKind.synthetic, TargetKind.transformer_lens),
        f"spd.maps names linear maps of the model itself, which target.kind={cfg.target.kind.value} does not show; write "
        "target.kind=huggingface or llama_simple_mlp",
    )
    require(
        cfg.activations.kind is ActivationsKind.live,
        f"activations.kind={cfg.activations.kind.value} holds no sequences, but spd trains on whole ones; write activations=live",
    )
    n, seq_len = cfg.training.batch_tokens, cfg.tokens.seq_len
    require(
        n % seq_len == 0,
        f"training.batch_tokens={n} must be a multiple of tokens.seq_len={seq_len}, since spd trains on whole sequences",
    )
    for name, each in spd.losses.items():
        require(
            not each.adversarial
            or each.source_scope is not SourceScope.repeated
            or (n // seq_len) % each.source_repeats == 0,
            f"spd.losses.{name}.source_repeats={each.source_repeats} must divide the {n // seq_len} sequences of a batch",
        )
    for name, each in spd.losses.items():
        require(
            not each.adversarial
            or each.source_scope not in (SourceScope.repeated, SourceScope.each)
            or cfg.evaluation.n_seqs >= n // seq_len,
            f"spd.losses.{name}.source_scope={each.source_scope.value} has sources for the {n // seq_len} sequences of a batch, but "
            f"evaluation.n_seqs={cfg.evaluation.n_seqs}, on which losses are measured too, are fewer; write {n // seq_len} or more",
        )
    sees_later = spd.importance.kind is ImportanceKind.global_shared_transformer and not spd.importance.causal
    require(
        not sees_later or cfg.tokens.packing is Packing.packed,
        "spd.importance.causal=false would see the padding of tokens.packing=documents; write packed, or causal=true",
    )
