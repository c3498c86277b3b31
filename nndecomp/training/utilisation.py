"""How much of what a device can multiply training uses.

    utilisation = FLOPs a token * tokens/s / peak        peak: products of two large matrices, measured for a moment before training

FLOPs are those that `nndecomp.training.flops` counts: what sparse training has to do, not what dense products would.
"""

import time
from dataclasses import dataclass

import torch

SIDE, N_TRIES = 2048, 5


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs/s of the fastest of a few products of square matrices."""
    a, b = torch.ones(2, SIDE, SIDE, device=device, dtype=dtype).unbind()
    seconds = []
    for _ in range(N_TRIES):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # a GPU is waited for
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(seconds)


@dataclass(frozen=True)
class Utilisation:
    per_token: float  # FLOPs of a token of training: the target's pass once, all objectives and their optimisers
    peak: float  # FLOPs/s

    def row(self, tokens_per_s: float, batch_tokens: int) -> dict[str, float]:
        return {
            "flops_per_step": round(self.per_token * batch_tokens, 0),
            "flops_per_s": round(self.per_token * tokens_per_s, 0),
            "utilisation": round(self.per_token * tokens_per_s / self.peak, 4),
        }
