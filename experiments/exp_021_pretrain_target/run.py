"""exp_021: a small language model trained from nothing, or trained on from another, to be taken apart by others.

python experiments/exp_021_pretrain_target/run.py                # the model that ships as target=tiny
python experiments/exp_021_pretrain_target/run.py tokens=files tokens.path=notes pretrain.d_model=256
python experiments/exp_021_pretrain_target/run.py pretrain.start=tiny tokens=stdlib_docs training.n_tokens=1_000_000

What it leaves is a target: target.path=output/exp_021_pretrain_target/<time>/target
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

from nndecomp.config.schema import RunConfig, TargetConfig, TargetKind, require
from nndecomp.run import experiment

PROMPT, SAMPLE, TEMPERATURE = 48, 128, 0.7


@experiment("exp_021_pretrain_target")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    import torch  # late, with all that loads it: --help does without
    from hydra.core.hydra_config import HydraConfig

    from nndecomp import build, checkpoint
    from nndecomp.evaluation.language_model import continuation, target_scores
    from nndecomp.report import card, style
    from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, load, load_tokenizer, save
    from nndecomp.targets.load import directory_of, load_target
    from nndecomp.tokens import TokenStream, heldout_tokens, open_tokens, training_documents
    from nndecomp.tokens.tokenizer import train_tokenizer
    from nndecomp.training.language_model import NextToken, TokenBatches, cross_entropy
    from nndecomp.training.log import Log
    from nndecomp.training.loop import train

    size, seq_len, batch_seqs = cfg.pretrain, cfg.tokens.seq_len, cfg.evaluation.batch_seqs
    assert size is not None, "conf/exp_021_pretrain_target.yaml has the sizes of the model"
    require(
        cfg.training.batch_tokens % seq_len == 0,
        f"training.batch_tokens={cfg.training.batch_tokens} must be a multiple of tokens.seq_len={seq_len}",
    )
    require(seq_len <= size.n_ctx, f"tokens.seq_len={seq_len} is more than pretrain.n_ctx={size.n_ctx}")

    device = build.device(cfg)
    sizes = LlamaSimpleMLPConfig(
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_mlp=size.d_mlp,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        n_ctx=size.n_ctx,
        n_vocab=size.vocab_size,
    )
    if size.start is None:
        texts = islice(training_documents(cfg.tokens, cfg.seed), size.tokenizer_documents)
        tokenizer = train_tokenizer(texts, size.vocab_size, size.n_ctx)
        model = LlamaSimpleMLP(sizes, torch.Generator().manual_seed(cfg.seed)).to(device)
    else:
        start = directory_of(TargetConfig(kind=TargetKind.llama_simple_mlp, path=size.start), weights=True)
        tokenizer, model = load_tokenizer(start), load(start).float().to(device)
        require(
            model.config == sizes, f"pretrain.start={size.start} has sizes {model.config}, but pretrain has {sizes}"
        )
    heldout = heldout_tokens(cfg.tokens, tokenizer, cfg.evaluation.n_seqs).to(device)
    texts_measured = {"heldout": heldout}
    if size.start_text is not None:
        read = replace(size.start_text, seq_len=seq_len)
        texts_measured["start_text"] = heldout_tokens(read, tokenizer, cfg.evaluation.n_seqs).to(device)
    before = {f"ce_{name}_before": cross_entropy(model, text, batch_seqs) for name, text in texts_measured.items()}

    documents = open_tokens(cfg.tokens, tokenizer, cfg.seed)
    assert isinstance(documents, TokenStream), f"tokens.kind={cfg.tokens.kind.value} is no text to train on"
    stream = TokenBatches(documents, cfg.training.batch_tokens // seq_len, device)
    with Log(out, cfg.log, name=f"{cfg.name}/{out.name}") as log:
        train(
            {"model": NextToken(model)},
            stream,
            cfg.training,
            out,
            log=log,
            evaluate=lambda step: {"ce": cross_entropy(model, heldout, batch_seqs)},
            description=cfg.name,
        )
    save(model, tokenizer, out / "target")

    target = load_target(TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(out / "target")), device)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    late = [row["ce"] for row in rows if row["name"] == "model" and row["tokens"] > 0.9 * cfg.training.n_tokens]
    scores = {"ce_training": sum(late) / len(late), **target_scores(target, heldout, batch_seqs)}
    if size.start is not None:
        scores |= before
        scores |= {f"ce_{name}": cross_entropy(model, text, batch_seqs) for name, text in texts_measured.items()}
    prompt = heldout.tokens[0, : min(PROMPT, seq_len // 2)]
    drawn = continuation(target, prompt, min(SAMPLE, size.n_ctx - len(prompt)), TEMPERATURE, cfg.seed)
    facts = {
        "command": " ".join([f"python experiments/{cfg.name}/run.py", *HydraConfig.get().overrides.task]),
        "text": card.text_of(cfg.tokens),
        "recipe": card.recipe_of(cfg.training),
        "device": str(device),
        "minutes": round(sum(row["timing"]["seconds"] for row in rows if "timing" in row) / 60, 1),
        "n_tokens": cfg.training.n_steps * cfg.training.batch_tokens,
        "n_epochs": documents.reader.state_dict()["epoch"],
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "n_evaluated": int(heldout.mask[:, 1:].sum()),
        "scores": scores,
        "sample": {
            "temperature": TEMPERATURE,
            "prompt": tokenizer.decode(prompt),
            "continuation": tokenizer.decode(drawn),
        },
    }
    checkpoint.write_json(out / "target" / "facts.json", facts)
    checkpoint.write_text(out / "target" / "README.md", card.model_card(cfg, size, facts))
    style.save(card.loss_figure(rows, scores["unigram_entropy"]), out / "figures", "loss")
    print((out / "target" / "README.md").read_text(), f"-> {out / 'target'}", sep="\n")
    return scores


if __name__ == "__main__":
    main()
