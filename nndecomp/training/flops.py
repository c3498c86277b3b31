"""What training costs, in floating-point operations: counted while a real step runs, not estimated.

A multiplication and an addition are two. Counted are matrix products, attention and sums of gathered rows (the sparse kernels'
`embedding_bag` and its relatives), forward and backward, whoever asks for them: the target's passes, encoders and gates, losses,
adversaries, recomputation. Not counted is what is linear in the size of one tensor (norms, activation functions, selection, sums),
but for the optimiser, whose update is counted by the entry of a parameter (`UPDATE`). Attention counts the whole square of
positions, as its kernels are rated, though causal ones skip half of it.

    FLOPs of a run = once + tokens * (target + objective + optimiser)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from nndecomp.config.schema import BackendKind, Optimizer, TrainingConfig
from nndecomp.decompositions import backends
from nndecomp.decompositions.spd.losses import faithfulness
from nndecomp.training.loop import Trainee
from nndecomp.training.objective import Objective
from nndecomp.training.parameters import SPDObjective

Shape = Sequence[int]

# Operations on every entry of a parameter and its momenta: Adam moves m (3) and v (4), corrects both (2), and divides and adds
# (5); AdamW and Muon shrink the parameter too (2); Signum moves one momentum (3) and adds its sign (3). Muon's products are counted.
UPDATE = {Optimizer.adam: 14, Optimizer.adamw: 16, Optimizer.sign: 8, Optimizer.muon: 9}
# Parts of names of operations that cost more than the size of a tensor: met without a formula, they stop the count.
COSTLY = (
    "attention",
    "embedding_bag",
    "mm",
    "linear",
    "conv",
    "linalg",
    "addmv",
    "cdist",
    "bilinear",
    "lstm",
    "gru",
    "fft",
)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _bag(table: Shape, indices: Shape, *args: Any, **kwargs: Any) -> int:
    """One row of the table for every index, scaled and added."""
    return 2 * indices[0] * table[1]


def _bag_weights_backward(rows: Shape, table: Shape, indices: Shape, *args: Any, **kwargs: Any) -> int:
    """One product of two rows for every index."""
    return 2 * indices[0] * table[1]


def _product(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """Of a matrix, or a vector, and a vector."""
    return 2 * prod(a)


def _product_added(start: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _linear(x: Shape, W: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * W[0]


_OPS = torch.ops.aten
# What torch's own counter passes over.
FORMULAS: dict[Any, Callable[..., int]] = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: _attention,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _OPS._embedding_bag: _bag,
    _OPS._embedding_bag_forward_only: _bag,
    _OPS._embedding_bag_per_sample_weights_backward: _bag_weights_backward,
    _OPS.mv: _product,
    _OPS.dot: _product,
    _OPS.addmv: _product_added,
    **({torch.ops.mkldnn._linear_pointwise: _linear} if torch.backends.mkldnn.is_available() else {}),
}


REGISTRY = {**flop_registry, **{each: shape_wrapper(formula) for each, formula in FORMULAS.items()}}


class _Counting(TorchDispatchMode):
    """Adds up what operations cost. Torch's own counter follows modules with hooks of autograd, which refuses gradients that are
    taken inside of others."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.missed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func._overloadpacket, kwargs or {}
        if packet not in REGISTRY:
            with self:
                whole = func.decompose(*args, **kwargs)  # of operations that are made of others
            if whole is not NotImplemented:
                return whole
        out = func(*args, **kwargs)
        if packet in REGISTRY:
            self.total += REGISTRY[packet](*args, **kwargs, out_val=out)
        elif packet is not _OPS.linalg_vector_norm and any(part in packet.__name__ for part in COSTLY):
            self.missed.add(str(packet))
        return out


def count(run: Callable[[], object]) -> int:
    """FLOPs of one call of `run`."""
    counting = _Counting()
    # Only torch's own operations are seen; the other backends do the same sums.
    with backends.using(BackendKind.torch), counting:
        run()
    assert not counting.missed, f"there is no formula for the cost of {', '.join(sorted(counting.missed))}"
    return counting.total


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs a token of training, and `once` for the whole run, before its first step."""

    target: float  # the target's undisturbed pass over the token
    objective: float  # loss and gradient, passes through a changed target included
    optimiser: float
    once: float = 0.0

    @property
    def per_token(self) -> float:
        return self.target + self.objective + self.optimiser

    def of(self, n_tokens: int) -> float:
        """FLOPs of a run."""
        return self.once + n_tokens * self.per_token

    def tokens(self, budget: float) -> float:
        """On how many tokens `budget` FLOPs train."""
        assert budget > self.once, f"{budget:.3g} FLOPs are used up before the first step, which takes {self.once:.3g}"
        return (budget - self.once) / self.per_token


def step_flops(objective: Objective, batch: Any, cfg: TrainingConfig) -> tuple[int, int]:
    """Of the objective and of the optimiser, in one step of the training loop on this batch; the objective is trained by it.

    It is the second step: the first has to start what nobody started. Dead features are not revived yet.
    """
    trainee = Trainee("counted", objective, cfg)
    objective.train()
    trainee.step(batch, 0)
    whole = count(lambda: trainee.step(batch, min(1, cfg.n_steps - 1)))
    products = count(trainee.optimiser.step)
    n_entries = sum(parameter.numel() for parameter in trainee.parameters.values())
    return whole - products, products + UPDATE[trainee.cfg.optimizer] * n_entries


def spd_flops(objective: SPDObjective, batch: Any, cfg: TrainingConfig) -> TrainingFlops:
    """Of a parameter decomposition: `target` is the undisturbed run that importances are made from, `once` the warm-up."""
    clean = count(lambda: objective.subject.run(batch))
    whole, optimiser = step_flops(objective, batch, cfg)
    own = list(objective.decomposition.components.values())
    matrices = [each.matrix() for each in objective.decomposition.sizes]
    fit = count(lambda: faithfulness(matrices, own).backward())
    fit += UPDATE[Optimizer.adamw] * sum(p.numel() for p in objective.decomposition.banks.parameters())
    n = cfg.batch_tokens
    return TrainingFlops(clean / n, (whole - clean) / n, optimiser / n, float(objective.cfg.warmup_steps * fit))
