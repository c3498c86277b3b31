"""What training cost, one line a decomposition."""

from collections.abc import Mapping

import pandas

from nndecomp.training.flops import TrainingFlops


def table(spent: Mapping[str, tuple[TrainingFlops, int]]) -> pandas.DataFrame:
    """FLOPs a token by what they are spent on, tokens, and FLOPs of the whole training."""
    return pandas.DataFrame(
        [
            {
                "decomposition": name,
                "target (FLOPs a token)": f"{flops.target:.3g}",
                "loss and gradient": f"{flops.objective:.3g}",
                "optimiser": f"{flops.optimiser:.3g}",
                "before training (FLOPs)": f"{flops.once:.3g}",
                "tokens": f"{n_tokens:,}",
                "in all (FLOPs)": f"{flops.of(n_tokens):.4g}",
            }
            for name, (flops, n_tokens) in spent.items()
        ]
    )
