"""exp_021: a small language model trained from nothing, to be taken apart by the other experiments.

python experiments/exp_021_pretrain_target/run.py                       # the model that ships as target=tiny
python experiments/exp_021_pretrain_target/run.py tokens=files tokens.path=notes/ pretrain.d_model=256
"""

from itertools import islice
from pathlib import Path

import torch

from nndecomp import build
from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment
from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, save
from nndecomp.tokens import heldout_tokens, open_tokens, training_documents
from nndecomp.tokens.tokenizer import train_tokenizer
from nndecomp.training.language_model import NextToken, TokenBatches, cross_entropy
from nndecomp.training.log import Log
from nndecomp.training.loop import train


@experiment("exp_021_pretrain_target")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    size = cfg.pretrain
    assert size is not None, "conf/exp_021_pretrain_target.yaml says pretrain"
    require(
        cfg.training.batch_tokens % cfg.tokens.seq_len == 0,
        f"training.batch_tokens={cfg.training.batch_tokens} must be a multiple of tokens.seq_len={cfg.tokens.seq_len}",
    )
    device = build.device(cfg)
    texts = islice(training_documents(cfg.tokens, cfg.seed), size.tokenizer_documents)
    tokenizer = train_tokenizer(texts, size.vocab_size, size.n_ctx)
    heldout = heldout_tokens(cfg.tokens, tokenizer, cfg.evaluation.n_seqs).to(device)
    stream = TokenBatches(
        open_tokens(cfg.tokens, tokenizer, cfg.seed), cfg.training.batch_tokens // cfg.tokens.seq_len, device
    )
    model = LlamaSimpleMLP(
        LlamaSimpleMLPConfig(
            n_layers=size.n_layers,
            d_model=size.d_model,
            d_mlp=size.d_mlp,
            n_heads=size.n_heads,
            n_kv_heads=size.n_kv_heads,
            n_ctx=size.n_ctx,
            n_vocab=size.vocab_size,
        ),
        torch.Generator().manual_seed(cfg.seed),
    ).to(device)

    with Log(out, cfg.log, cfg.name) as log:
        train(
            {"model": NextToken(model)},
            stream,
            cfg.training,
            out,
            log=log,
            evaluate=lambda step: {"ce": cross_entropy(model, heldout, cfg.evaluation.batch_seqs)},
            description="pretrain",
        )
    save(model.cpu(), tokenizer, out / "target")
    return {}


if __name__ == "__main__":
    main()
