"""The model card and the loss figure of a language model trained by exp_021_pretrain_target."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nndecomp.config.schema import PretrainConfig, RunConfig, TokensConfig, TokensKind, TrainingConfig
from nndecomp.report.style import COLOURS, GREY, RC


def loss_figure(rows: Sequence[Mapping[str, Any]], unigram: float) -> Figure:
    """Cross-entropy in training and on held-out text against tokens seen, from metrics.jsonl."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4.5, 3.0), layout="constrained")
        axes = figure.subplots()
        for name, label, colour, marker in (
            ("model", "training", COLOURS["transcoder"], ""),
            ("heldout", "held-out", COLOURS["cross_layer_transcoder"], "o"),
        ):
            points = [(row["tokens"] / 1e6, row["ce"]) for row in rows if row["name"] == name]
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=3)
        axes.axhline(unigram, color=GREY, linestyle=":", label="unigram entropy")
        axes.set_xlabel("tokens (millions)")
        axes.set_ylabel("cross-entropy (nats)")
        axes.legend()
    return figure


def text_of(cfg: TokensConfig) -> str:
    """The text, in words."""
    held = f"{cfg.heldout_fraction:.0%} of the documents held out by the hash of their content"
    match cfg.kind:
        case TokensKind.stdlib:
            return (
                f"the Python {platform.python_version()} standard library's own modules, without its tests; "
                f"{cfg.heldout_fraction:.0%} of the files held out by the hash of their path"
            )
        case TokensKind.stdlib_docs:
            return (
                f"docstrings and help topics of the Python {platform.python_version()} standard library, without its tests; "
                f"{cfg.heldout_fraction:.0%} of the files held out by the hash of their path"
            )
        case TokensKind.files:
            return f"{cfg.path}; {held}"
        case TokensKind.random:
            return "token ids drawn evenly"
        case TokensKind.hub:
            return (
                f"{cfg.path}, split {cfg.split}; {f'held-out split {cfg.heldout_split}' if cfg.heldout_split else held}"
            )


def recipe_of(cfg: TrainingConfig) -> str:
    return (
        f"{cfg.optimizer.value}, betas {cfg.betas[0]} and {cfg.betas[1]}, weight decay {cfg.weight_decay} on matrices, "
        f"batches of {cfg.batch_tokens} tokens, learning rate {cfg.lr} ({cfg.lr_schedule.value}, "
        f"{cfg.lr_warmup:.0%} warm-up, down to {cfg.lr_end:.0%}), gradient norm clipped at {cfg.clip_norm}"
    )


def _start_of(size: PretrainConfig, scores: Mapping[str, float]) -> str:
    """What was fine-tuned, and what that did to both texts; nothing for a model trained from nothing."""
    if size.start is None:
        return ""
    lines = f"""- **Start**: the weights of `{size.start}`, all of them trained on.

| held-out cross-entropy, nats per token | before | after |
|---|---|---|
| the text below | {scores["ce_heldout_before"]:.3f} | {scores["ce_heldout"]:.3f} |
"""
    if size.start_text is not None:
        own = text_of(size.start_text).partition(";")[0]
        lines += f"| {own} | {scores['ce_start_text_before']:.3f} | {scores['ce_start_text']:.3f} |\n"
    return f"{lines}\n"


def model_card(cfg: RunConfig, size: PretrainConfig, facts: Mapping[str, Any]) -> str:
    """README.md of the target's directory. `facts` are those of facts.json beside it."""
    scores, sample = facts["scores"], facts["sample"]
    singles = "\n".join(
        f"| MLP of layer {layer} | {scores[f'zero_L{layer}.mlp_out']:+.3f} |" for layer in range(size.n_layers)
    )
    tokenizer = f"byte-level BPE of {size.vocab_size} tokens, trained on the training split alone"
    if size.start is not None:
        tokenizer = f"that of `{size.start}`, {size.vocab_size} tokens"
    return f"""# A small language model to be taken apart

A LlamaSimpleMLP: {size.n_layers} layers, d_model {size.d_model}, {size.d_mlp} neurons a layer, {size.n_heads} query heads and {size.n_kv_heads} key heads,
context {size.n_ctx}, {size.vocab_size} tokens, {facts["n_parameters"]:,} parameters in float32. It is good for nothing but being studied.

{_start_of(size, scores)}- **Text**: {facts["text"]}.
- **Tokens**: {facts["n_tokens"]:,}; the training text was read {facts["n_epochs"]} times in full. Rows of {cfg.tokens.seq_len}, documents joined by `<|endoftext|>`, no BOS.
- **Tokenizer**: {tokenizer}.
- **Command**: `{facts["command"]}`
- **Training**: {facts["recipe"]}, seed {cfg.seed}; {facts["minutes"]} minutes ({facts["device"]}).

| nats per token | |
|---|---|
| cross-entropy, training text, mean over the last tenth of training | {scores["ce_training"]:.3f} |
| cross-entropy, held-out text | {scores["ce_heldout"]:.3f} |
| unigram entropy of the held-out text | {scores["unigram_entropy"]:.3f} |

Held-out numbers are of {facts["n_evaluated"]:,} tokens. What zero-ablation adds to the held-out cross-entropy:

| zero-ablated | nats |
|---|---|
| all MLPs | {scores["zero_all"]:+.3f} |
{singles}

A sample at temperature {sample["temperature"]}; up to the mark ⟫ it is held-out text, the rest is the model's:

````text
{sample["prompt"]}⟫{sample["continuation"]}
````

Files: `model.safetensors`, `model_config.yaml`, `tokenizer.json`, `tokenizer_config.json`; `facts.json` has the numbers above.
"""
