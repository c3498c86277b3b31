"""What the training loop sees of a dictionary: a loss of raw rows, and what happens after each step.

Rows are divided by each site's scale s (E|x|^2 = s^2 * width) before the dictionary sees them; `finished` folds the
scales into the weights. All state is in the module's state_dict, so a checkpoint of it is complete.
"""

import copy
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.config.schema import Dead, DecompositionConfig, Penalty, TrainingConfig
from nndecomp.decompositions import losses
from nndecomp.decompositions.activation_base import Selecting
from nndecomp.decompositions.codes import Codes, Encoding, Scales
from nndecomp.decompositions.groups import SparseDictionary, columns_of
from nndecomp.types import Layout, Site


class DictionaryObjective(nn.Module):
    """Trains one dictionary on rows of `layout`, which may hold other sites as well."""

    def __init__(
        self,
        dictionary: SparseDictionary,
        cfg: DecompositionConfig,
        layout: Layout,
        scales: dict[Site, float],
    ) -> None:
        super().__init__()
        missing = [str(s) for s in (*dictionary.reads, *dictionary.writes) if s not in layout.spans]
        assert not missing, f"rows hold {', '.join(map(str, layout.sites))}, but not {', '.join(missing)}"
        self.dictionary, self.cfg, self.layout = dictionary, cfg, layout
        self._k = list(dictionary.activation.k) if isinstance(dictionary.activation, Selecting) else []
        device = dictionary.b_dec.device
        self.s_read: Tensor
        self.s_write: Tensor
        self.tokens_since_fired: Tensor
        self.register_buffer("s_read", columns_of(scales, dictionary.read_layout).to(device))
        self.register_buffer("s_write", columns_of(scales, dictionary.write_layout).to(device))
        n_features = sum(bank.n_features for bank in dictionary.banks)
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64, device=device))
        self._mixed_weights = (cfg.mixed_weights[0], cfg.mixed_weights[1])
        self._tokens_seen = 0  # on the host, so that steps need not wait for the device
        # From loss to after_step: codes, the scales they were compared by, which fired, tokens.
        self._step: tuple[Codes, Scales, Tensor, int] | None = None
        if cfg.unit_norm_decoder:
            self._normalise_decoder()

    def get_extra_state(self) -> Int[Tensor, "_"]:
        """Tokens seen, then k of each group, which annealing may have moved."""
        activation = self.dictionary.activation
        return torch.tensor([self._tokens_seen, *(activation.k if isinstance(activation, Selecting) else [])])

    def set_extra_state(self, state: Int[Tensor, "_"]) -> None:
        self._tokens_seen, *k = state.tolist()
        if isinstance(self.dictionary.activation, Selecting):
            self.dictionary.activation.k = k

    def loss(self, rows: Float[Tensor, "token width"], progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss of a batch and detached metrics. `progress`, from 0 to 1, drives the schedules of k and penalty."""
        x = self._columns(rows, self.dictionary.read_layout) / self.s_read
        y = self._columns(rows, self.dictionary.write_layout) / self.s_write
        if self._tokens_seen == 0 and self.training:
            with torch.no_grad():
                self.dictionary.b_dec.copy_(y.mean(0))
        self._anneal_k(progress)
        encoding = self.dictionary.encoding(x)
        codes, penalty = encoding.codes, self._penalty(encoding)
        residual = y - self.dictionary.decode(codes, x)
        fit = losses.reconstruction(residual, y, self.cfg.reconstruction, self.dictionary.write_layout)
        fvu = losses.fvu(residual.detach(), y, self.dictionary.write_layout)
        terms = {"reconstruction": fit}
        if penalty is not None:
            warm = min(1.0, progress / self.cfg.penalty_warmup) if self.cfg.penalty_warmup > 0 else 1.0
            terms["penalty"] = self.cfg.penalty_coefficient * warm * penalty
        if (aux := self._aux_k(x, residual)) is not None:
            terms["aux"] = self.cfg.aux_coefficient * aux
        loss = torch.stack(list(terms.values())).sum()
        if self.training:
            self._step = (codes, encoding.scales, codes.fired(), len(rows))
        return loss, {"loss": loss.detach(), "fvu": fvu, **self._metrics(codes), **_detached(terms)}

    @torch.no_grad()
    def before_step(self) -> None:
        """With unit-norm decoders: take away the part of the gradient that normalising would undo."""
        if not self.cfg.unit_norm_decoder:
            return
        for bank in self.dictionary.banks:
            assert bank.W_dec.grad is not None, f"group {bank.name} has no gradient; before_step follows backward"
            bank.W_dec.grad -= (bank.W_dec.grad * bank.W_dec).sum(1, keepdim=True) * bank.W_dec

    @torch.no_grad()
    def after_step(self) -> None:
        """Decoder norms, the inference threshold, and liveness, from the batch of the last `loss`."""
        assert self._step is not None, "after_step follows a loss in training mode"
        codes, scales, fired, n_tokens = self._step
        self._step = None
        if self.cfg.unit_norm_decoder:
            self._normalise_decoder()
        self.dictionary.activation.after_step(codes, scales)
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(fired, 0)
        self._tokens_seen += n_tokens

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        """`decomposition` goes before `training`, where it says something."""
        own = {"optimizer": self.cfg.optimizer, "lr": self.cfg.lr, "betas": self.cfg.betas}
        return replace(cfg, **{name: value for name, value in own.items() if value is not None})

    def lr_shares(self) -> dict[str, float]:
        """Thresholds of JumpReLU may learn slower than weights."""
        thresholds = [name for name, _ in self.named_parameters() if name.startswith("dictionary.activation.")]
        return {} if self.cfg.threshold_lr == 1 else dict.fromkeys(thresholds, self.cfg.threshold_lr)

    def finished(self) -> SparseDictionary:
        """A copy in eval mode that works on raw activations."""
        dictionary = copy.deepcopy(self.dictionary).eval()
        dictionary.fold(self.s_read, self.s_write)
        return dictionary

    def _columns(self, rows: Float[Tensor, "token width"], layout: Layout) -> Float[Tensor, "token columns"]:
        span = self.layout.span(layout.sites)
        if span is not None:
            return rows[:, span]
        return torch.cat([rows[:, self.layout.spans[site]] for site in layout.sites], 1)

    def _anneal_k(self, progress: float) -> None:
        """From k_start to k in a straight line over the first k_anneal share of training."""
        activation, start = self.dictionary.activation, self.cfg.k_start
        if isinstance(activation, Selecting) and start is not None and self.cfg.k_anneal > 0:
            share = min(1.0, progress / self.cfg.k_anneal)
            activation.k = [round(start + share * (k - start)) for k in self._k]

    def _penalty(self, encoding: Encoding) -> Tensor | None:
        """Without its coefficient."""
        cfg = self.cfg
        match cfg.penalty:
            case Penalty.none:
                return None
            case Penalty.l0:
                return losses.l0(self.dictionary.active(encoding))
            case _:
                c = [bank.scale(cfg.penalty_normalisation, self._mixed_weights) for bank in self.dictionary.banks]
                return losses.penalty(encoding.codes, c, cfg.penalty, cfg.penalty_scale)

    def _aux_k(self, x: Float[Tensor, "token d_reads"], residual: Float[Tensor, "token d_writes"]) -> Tensor | None:
        """Mean over groups, 0 for those without dead features; None, at no cost, before anything can be dead."""
        if self.cfg.dead is not Dead.aux_k or self._tokens_seen < self.cfg.dead_after_tokens:
            return None
        dead = losses.dead_features(self.tokens_since_fired, self.cfg.dead_after_tokens)
        banks = self.dictionary.banks
        dead_of = [own.nonzero().squeeze(1) for own in dead.split([bank.n_features for bank in banks])]
        terms = [
            losses.aux_k(
                residual[:, bank.writes],
                self.dictionary.read(x, g),
                bank.W_enc,
                bank.b_enc,
                bank.W_dec,
                dead_of[g],
                self.cfg.aux_k,
            )
            for g, bank in enumerate(banks)
            if len(dead_of[g]) > 0
        ]
        return torch.stack(terms).sum() / len(banks) if terms else None

    def _metrics(self, codes: Codes) -> dict[str, Tensor]:
        """l0 of each group and their mean; share of features that are dead."""
        l0 = codes.counts().float().mean(0)
        names = [bank.name for bank in self.dictionary.banks]
        dead = losses.dead_features(self.tokens_since_fired, self.cfg.dead_after_tokens)
        each = {f"l0/{name}": l0[g] for g, name in enumerate(names)} if len(names) > 1 else {}
        return {"l0": l0.mean(), "dead": dead.float().mean(), **each}

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        for bank in self.dictionary.banks:
            bank.W_dec.div_(bank.W_dec.norm(dim=1, keepdim=True))


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"loss/{name}": term.detach() for name, term in terms.items()}
