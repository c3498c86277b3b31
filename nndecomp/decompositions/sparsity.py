"""The penalty as training meets it: its coefficient's warm-up, its weights c, and p on its way down."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import DecompositionConfig, Penalty
from nndecomp.decompositions import penalties
from nndecomp.decompositions.codes import Codes, Encoding, Scales
from nndecomp.decompositions.groups import SparseDictionary


class Sparsity(nn.Module):
    """coefficient * warm-up * ratio * penalty.

    `ratio` is 1 but for lp, where v^p grows as p falls. Whenever p moves on, ratio is multiplied by the penalty before over
    the penalty after, of the same codes, so that the product does not jump (Karvonen et al. 2024, arXiv 2408.00113, sec. 4.2).
    """

    def __init__(self, cfg: DecompositionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ratio: Tensor
        self.register_buffer("ratio", torch.ones(()))
        self._p = cfg.p_start  # that `ratio` belongs to
        self._moved: tuple[float, Tensor] | None = None  # p and ratio as the last loss had them

    def get_extra_state(self) -> Float[Tensor, "1"]:
        return torch.tensor([self._p], dtype=torch.float64)

    def set_extra_state(self, state: Float[Tensor, "1"]) -> None:
        self._p = float(state)

    def term(self, dictionary: SparseDictionary, encoding: Encoding, progress: float) -> Float[Tensor, ""] | None:
        cfg = self.cfg
        if cfg.penalty is Penalty.none:
            return None
        warm = min(1.0, progress / cfg.penalty_warmup) if cfg.penalty_warmup > 0 else 1.0
        return cfg.penalty_coefficient * warm * self._penalty(dictionary, encoding, progress)

    def after_step(self) -> None:
        """p and its ratio stay as the last loss had them."""
        if self._moved is not None:
            self._p, ratio = self._moved
            self.ratio.copy_(ratio)
            self._moved = None

    def metrics(self, progress: float) -> dict[str, Tensor]:
        return {"p": torch.full_like(self.ratio, self._p_at(progress))} if self.cfg.penalty is Penalty.lp else {}

    def _penalty(self, dictionary: SparseDictionary, encoding: Encoding, progress: float) -> Float[Tensor, ""]:
        cfg = self.cfg
        match cfg.penalty:
            case Penalty.l0:
                return penalties.l0(dictionary.active(encoding))
            case Penalty.l0_target:
                assert cfg.penalty_target is not None, "checked with the settings"
                return penalties.l0_target(dictionary.active(encoding), cfg.penalty_target)
            case _:
                pass
        # Where a gate decides what is active, the penalty is on the gate.
        gates = encoding.gates
        codes = encoding.codes if gates is None else Codes(gates)
        mixed = (cfg.mixed_weights[0], cfg.mixed_weights[1])
        c = [bank.scale(cfg.penalty_normalisation, mixed) for bank in dictionary.banks]
        if gates is not None and not cfg.gate_trains_decoder:
            # Where no loss of the gate holds decoder rows up, a penalty by their norms would shrink them to nothing, and
            # the magnitudes, which it does not see, would make up for it: everything fires.
            c = [None if own is None else own.detach() for own in c]
        match cfg.penalty:
            case Penalty.l1:
                return penalties.l1(codes, c)
            case Penalty.tanh:
                return penalties.tanh(codes, c, cfg.penalty_scale)
            case Penalty.tanh_quadratic:
                return penalties.tanh_quadratic(codes, c, cfg.penalty_scale, cfg.penalty_frequency)
            case Penalty.lp:
                return self._lp(codes, c, self._p_at(progress))
            case other:
                raise AssertionError(f"penalty {other.value} is not a function of codes")

    def _lp(self, codes: Codes, c: Scales, p: float) -> Float[Tensor, ""]:
        now, ratio = penalties.lp(codes, c, p), self.ratio
        if p != self._p:
            with torch.no_grad():
                before = penalties.lp(codes, c, self._p)
                ratio = ratio * torch.where(now > 0, before / now.clamp_min(torch.finfo(now.dtype).tiny), 1.0)
        if self.training:
            self._moved = (p, ratio)
        return ratio * now

    def _p_at(self, progress: float) -> float:
        cfg = self.cfg
        return penalties.p_at(progress, cfg.p_start, cfg.p_end, (cfg.p_anneal[0], cfg.p_anneal[1]), cfg.p_steps)
