"""The model card and the loss figure of a language model trained by exp_021, from measured facts alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from nndecomp.report.style import COLOURS, GREY, OTHER


def loss_figure(rows: Sequence[Mapping[str, Any]], unigram: float) -> Figure:
    """Training and held-out cross-entropy against tokens seen; the unigram entropy for scale."""
    figure = Figure(figsize=(4.5, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, label, colour in (("model", "training", COLOURS["transcoder"]), ("heldout", "held-out", OTHER[0])):
        points = [(row["tokens"] / 1e6, row["ce"]) for row in rows if row["name"] == name]
        axes.plot(*zip(*points, strict=True), label=label, color=colour)
    axes.axhline(unigram, color=GREY, linestyle=":", label="unigram entropy")
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("cross-entropy (nats)")
    axes.legend()
    return figure


def model_card(facts: Mapping[str, Any]) -> str:
    """`facts` as exp_021 writes them to facts.json; every number in the card is one of them."""
    size, ce, ablated = facts["model"], facts["cross_entropy"], facts["zero_ablation_increase"]
    layers = "\n".join(f"| MLP of layer {layer} | +{nats:.3f} |" for layer, nats in enumerate(ablated["single"]))
    return f"""# {facts["name"]}: a small language model to be taken apart

A LlamaSimpleMLP of {size["n_layers"]} layers (d_model {size["d_model"]}, {size["d_mlp"]} neurons a layer, {size["n_heads"]} heads of which {size["n_kv_heads"]} hold keys and
values, context {size["n_ctx"]}, {size["n_vocab"]} tokens, {size["n_parameters"]:,} parameters in float32). It is not useful for anything
but being studied.

- Text: {facts["text"]}.
- Tokens: {facts["n_tokens"]:,} for training ({facts["n_epochs"]} passes over the training text finished), {ce["n_heldout_tokens"]:,} for the held-out numbers.
- Tokenizer: byte-level BPE of {size["n_vocab"]} tokens, trained on the training split; `<|endoftext|>` ends a document; no BOS.
- Command: `{facts["command"]}`
- Training: {facts["optimiser"]}; {facts["minutes"]:.0f} minutes on {facts["device"]}.

| cross-entropy, nats a token | |
|---|---|
| training text | {ce["training"]:.3f} |
| held-out text | {ce["heldout"]:.3f} |
| held-out text, unigram entropy | {ce["unigram"]:.3f} |

| zero-ablation: increase of held-out cross-entropy, nats | |
|---|---|
| all MLPs | +{ablated["all"]:.3f} |
{layers}

The first {facts["sample"]["n_prompt"]} tokens are held-out text, the rest is drawn from the model at temperature {facts["sample"]["temperature"]}:

````text
{facts["sample"]["prompt"]}⟪{facts["sample"]["continuation"]}⟫
````

Files: `model.safetensors`, `model_config.yaml`, `tokenizer.json`, `tokenizer_config.json`, and `facts.json` with the numbers above.
"""
