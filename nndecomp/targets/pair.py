"""Two models side by side as one target: the same tokens go through both, and a site says which of them it is in.

    A:L3.resid_post    the first one, of `target`            B:L3.resid_post    the second one, of `paired_target`

A row of activations at sites of both is one token as both see it. Widths, depths and families may differ; the tokenizer
may not, for then there would be no same token. Models run one after the other and nothing passes between them: patching
one leaves the other as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.config.checks import require
from nndecomp.config.target import TargetConfig
from nndecomp.errors import SettingError
from nndecomp.targets.base import Heads, Neurons, Replace, Shape, Target, TargetShape
from nndecomp.targets.load import load_target, target_shape
from nndecomp.types import Site

A, B = "A", "B"
# Two tokenizers of one vocabulary may still cut text differently, or begin it differently.
_PROBE = "In 2024, the naïve  programmer's\n\tx[i] += 3.14  # 東京 😀\n<b>don't</b> RE-ENTER\n"


@dataclass(frozen=True)
class PairedShape(Shape):
    a: TargetShape
    b: TargetShape

    @property
    def n_ctx(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] what both take in
        return min(self.a.n_ctx, self.b.n_ctx)

    @property
    def models(self) -> tuple[str | None, ...]:
        return (A, B)

    def of(self, model: str | None) -> TargetShape:
        match model:
            case "A":
                return self.a
            case "B":
                return self.b
            case None:
                raise SettingError(
                    "a site does not say which of two models it is in; begin it with A: (target) or B: (paired_target)"
                )
            case other:
                raise SettingError(
                    f"a site begins with {other}: but the two models are A (target) and B (paired_target)"
                )

    def width(self, site: Site) -> int:
        return self.of(site.model).width(site.within)

    def check(self, site: Site, setting: str) -> None:
        self.of(site.model).check(site.within, f"{setting}, in model {site.model},")


class PairedTarget(Target):
    """`predicts`: the model whose logits are asked for, "A" or "B".

    Raises SettingError if the two do not share a tokenizer.
    """

    def __init__(self, a: Target, b: Target, predicts: str = A) -> None:
        assert isinstance(a.shape, TargetShape) and isinstance(b.shape, TargetShape), "a pair is of two single models"
        assert a.device == b.device, f"two models on two devices, {a.device} and {b.device}, give no common rows"
        assert predicts in (A, B), f"the models are called A and B, not {predicts}"
        check_tokenizers(a, b)
        self.pair = {A: a, B: b}
        self.predicts = predicts
        self.name, self.shape = f"{a.name}+{b.name}", PairedShape(a.shape, b.shape)
        self.tokenizer, self.device = a.tokenizer, a.device

    def predicting(self, model: str | None) -> "PairedTarget":
        assert model in (A, B), f"the models are called A and B, not {model}"
        other = copy(self)
        other.predicts = model
        return other

    def twin(self) -> "PairedTarget":
        other = copy(self)
        other.pair = {model: each.twin() for model, each in self.pair.items()}
        return other

    def record(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch pos width"]]:
        found: dict[Site, Tensor] = {}
        for model, own in _by_model(sites).items():
            recorded = self.pair[model].record(tokens, [site.within for site in own])
            found |= {site: recorded.pop(site.within) for site in own}
        return {site: found[site] for site in sites}

    @contextmanager
    def patch(self, replacements: Mapping[Site, Replace]) -> Iterator[None]:
        with ExitStack() as patched:
            for model, own in _by_model(list(replacements)).items():
                within = {site.within: replacements[site] for site in own}
                patched.enter_context(self.pair[model].patch(within))
            yield

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return self.pair[self.predicts].logits(tokens)

    def heads_of(self, site: Site) -> Heads:
        assert site.model in (A, B), f"the models are called A and B, not {site.model}"
        return self.pair[site.model].heads_of(site.within)

    def mlp_out_of(self, layer: int, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows d"]:
        return self.pair[self.predicts].mlp_out_of(layer, hidden)

    def mlp_of(self, site: Site, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        assert site.model is not None, f"{site} is in neither of two models"
        return self.pair[site.model].mlp_of(site.within, rows)

    def neurons_of(self, site: Site) -> Neurons:
        assert site.model is not None, f"{site} is in neither of two models"
        return self.pair[site.model].neurons_of(site.within)


def _by_model(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites of each model that has any, A first."""
    strangers = [str(site) for site in sites if site.model not in (A, B)]
    assert not strangers, f"{', '.join(strangers)}: sites of a pair begin with A: or B:"
    return {model: own for model in (A, B) if (own := [site for site in sites if site.model == model])}


def check_tokenizers(a: Target, b: Target) -> None:
    """SettingError unless both make the same tokens of the same text."""
    if a.tokenizer is None and b.tokenizer is None:
        return  # rows are drawn from known features, not harvested from tokens
    first, second = _tokenisation(a.tokenizer), _tokenisation(b.tokenizer)
    for what, one in first.items():
        require(
            one == second[what],
            f"paired_target {b.name} and target {a.name} do not share a tokenizer: {what} differs; "
            "two models are compared on the same tokens, so choose one with the same tokenizer",
        )


def _tokenisation(tokenizer: Any) -> dict[str, object]:
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    return {
        "the vocabulary": tokenizer.get_vocab(),
        **{f"the {name.removesuffix('_id').replace('_', ' ')}": getattr(tokenizer, name) for name in special},
        "how text is cut": tokenizer(_PROBE)["input_ids"],
    }


def load_pair(a: TargetConfig, b: TargetConfig, device: torch.device) -> PairedTarget:
    return PairedTarget(load_target(a, device), load_target(b, device))


def paired_shape(a: TargetConfig, b: TargetConfig) -> PairedShape:
    """Sizes from the configuration files alone."""
    return PairedShape(target_shape(a), target_shape(b))
