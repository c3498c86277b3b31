"""How derivatives of replacements are compared with those of the target."""

from dataclasses import dataclass

from nndecomp.config.checks import require


@dataclass(kw_only=True)
class FaithfulnessConfig:
    tokens_per_seq: int  # tokens of each held-out sequence at which Jacobians of single MLPs are compared
    n_logits: int  # most likely next tokens whose logits are differentiated, at one position of each sequence

    def __post_init__(self) -> None:
        for name in ("tokens_per_seq", "n_logits"):
            require(getattr(self, name) > 0, f"faithfulness.{name}={getattr(self, name)} must be a positive number")
