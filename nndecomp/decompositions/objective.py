"""What the training loop sees of a dictionary: a loss of raw rows, and what happens after each step.

Rows are divided by each site's scale s (E|x|^2 = s^2 * width) before the dictionary sees them; `finished` folds the
scales into the weights. All state is in the module's state_dict, so a checkpoint of it is complete.
"""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nndecomp.config.schema import (
    CodeNormalisation,
    Dead,
    Decoder,
    DecompositionConfig,
    PreActivationLoss,
    TrainingConfig,
)
from nndecomp.decompositions import archetypal, losses, penalties
from nndecomp.decompositions.activation_base import Selecting
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.codes import Codes, DenseCodes, Encoding
from nndecomp.decompositions.dead import (
    aux_k,
    dead_features,
    dead_pre_activations,
    families,
    fired_anywhere,
    ghost,
)
from nndecomp.decompositions.groups import SparseDictionary, columns_of
from nndecomp.decompositions.matryoshka import prefix_reconstructions
from nndecomp.decompositions.resampling import Rows, resample
from nndecomp.decompositions.sparsity import Sparsity
from nndecomp.types import Layout, Site


@dataclass
class _Step:
    """What after_step wants to know of the last loss."""

    encoding: Encoding
    fired: Bool[Tensor, "all_features"]
    x: Float[Tensor, "token d_reads"]
    residual: Float[Tensor, "token d_writes"]


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
        self.sparsity = Sparsity(cfg).to(device)
        self._families = families(dictionary)
        self._tokens_seen = 0  # on the host, so that steps need not wait for the device
        self._resampled = 0  # how many times
        self._step: _Step | None = None  # from loss to after_step
        self._resets: Rows = []
        if cfg.unit_norm_decoder:
            self._normalise_decoder()
        if cfg.decoder is Decoder.archetypal:
            for bank in dictionary.banks:
                archetypal.replace_decoder(bank, cfg.archetypes, cfg.archetypal_slack)

    def get_extra_state(self) -> Int[Tensor, "_"]:
        """Tokens seen, times resampled, then k of each group, which annealing may have moved."""
        activation = self.dictionary.activation
        k = activation.k if isinstance(activation, Selecting) else []
        return torch.tensor([self._tokens_seen, self._resampled, *k])

    def set_extra_state(self, state: Int[Tensor, "_"]) -> None:
        self._tokens_seen, self._resampled, *k = state.tolist()
        if isinstance(self.dictionary.activation, Selecting):
            self.dictionary.activation.k = k

    def loss(self, rows: Float[Tensor, "token width"], progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss of a batch and detached metrics. `progress`, from 0 to 1, drives the schedules of k and penalty."""
        x = self._columns(rows, self.dictionary.read_layout) / self.s_read
        y = self._columns(rows, self.dictionary.write_layout) / self.s_write
        if self._tokens_seen == 0 and self.training:
            self._begin(y)
        # An archetypal decoder is computed once a step: the first time, with its gradient.
        with parametrize.cached():
            decoders = [bank.W_dec for bank in self.dictionary.banks]
            assert all(W_dec.requires_grad for W_dec in decoders if torch.is_grad_enabled()), "decoders are trained"
            return self._loss(x, y, progress)

    @torch.no_grad()
    def _begin(self, y: Float[Tensor, "token d_writes"]) -> None:
        self.dictionary.b_dec.copy_(y.mean(0))
        if self.cfg.decoder is Decoder.archetypal:
            for spec, bank in zip(self.dictionary.spec.groups, self.dictionary.banks, strict=True):
                archetypal.place(bank, y[:, bank.writes] - self.dictionary.b_dec[bank.writes])
                if spec.reads == spec.writes:
                    bank.W_enc.copy_(bank.W_dec / bank.W_dec.norm(dim=1, keepdim=True))

    def _loss(
        self, x: Float[Tensor, "token d_reads"], y: Float[Tensor, "token d_writes"], progress: float
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        self._anneal_k(progress)
        encoding = self.dictionary.encoding(x)
        dead = dead_features(self.tokens_since_fired, self.cfg.dead_after_tokens)
        residual, fit = self._fit(encoding, x, y)
        terms = {
            "reconstruction": self.cfg.local_coefficient * fit,
            "gate": self._gate(encoding, x, y),
            "penalty": self.sparsity.term(self.dictionary, encoding, progress),
            "pre_activation": self._pre_activation(encoding, x, dead),
            "aux": self._revival(encoding, x, residual, fit, dead),
        }
        terms = {name: term for name, term in terms.items() if term is not None}
        loss = torch.stack(list(terms.values())).sum()
        if self.training:
            self._step = _Step(encoding, encoding.codes.fired(), x, residual.detach())
        return loss, {
            "loss": loss.detach(),
            "fvu": losses.fvu(residual.detach(), y, self.dictionary.write_layout),
            **self._metrics(encoding.codes, dead),
            **self.sparsity.metrics(progress),
            **{f"loss/{name}": term.detach() for name, term in terms.items()},
        }

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
        step, self._step = self._step, None
        if self.cfg.unit_norm_decoder:
            self._normalise_decoder()
        self.dictionary.activation.after_step(step.encoding.codes, step.encoding.scales)
        self.sparsity.after_step()
        self.tokens_since_fired += len(step.x)
        self.tokens_since_fired.masked_fill_(fired_anywhere(step.fired, self.dictionary, self._families), 0)
        # With the first batch after so many tokens: training does not end with features that have just been drawn.
        if self.cfg.dead is Dead.resample and self._tokens_seen // self.cfg.resample_every > self._resampled:
            self._resampled += 1
            self._resample(step)
        self._tokens_seen += len(step.x)

    def take_resets(self) -> Rows:
        """Rows of parameters that the last step wrote anew."""
        resets, self._resets = self._resets, []
        return resets

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
        computed = self.cfg.decoder is Decoder.archetypal
        dictionary = (archetypal.baked(self.dictionary) if computed else copy.deepcopy(self.dictionary)).eval()
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
        if self.training and isinstance(activation, Selecting) and start is not None and self.cfg.k_anneal > 0:
            share = min(1.0, progress / self.cfg.k_anneal)
            activation.k = [round(start + share * (k - start)) for k in self._k]

    def _fit(
        self, encoding: Encoding, x: Float[Tensor, "token d_reads"], y: Float[Tensor, "token d_writes"]
    ) -> tuple[Float[Tensor, "token d_writes"], Float[Tensor, ""]]:
        """y - y_hat, and the reconstruction loss: with matryoshka the weighted sum over prefixes."""
        cfg, layout = self.cfg, self.dictionary.write_layout
        if cfg.matryoshka is None:
            residual = y - self.dictionary.decode(encoding.codes, x)
            return residual, losses.reconstruction(residual, y, cfg.reconstruction, layout)
        residuals = [y - y_hat for y_hat in prefix_reconstructions(self.dictionary, encoding.codes, x, cfg.matryoshka)]
        weights = cfg.matryoshka_weights or [1 / len(residuals)] * len(residuals)
        fits = [
            weight * losses.reconstruction(residual, y, cfg.reconstruction, layout)
            for weight, residual in zip(weights, residuals, strict=True)
        ]
        return residuals[-1], torch.stack(fits).sum()

    def _gate(
        self, encoding: Encoding, x: Float[Tensor, "token d_reads"], y: Float[Tensor, "token d_writes"]
    ) -> Float[Tensor, ""] | None:
        """The gate alone has to reconstruct; decoder, skip and bias learn nothing from it (Rajamanoharan et al. 2024,
        arXiv 2404.16014, eq. 8)."""
        if encoding.gates is None:
            return None
        y_hat = self.dictionary.b_dec.detach().repeat(len(y), 1)
        for bank, gate in zip(self.dictionary.banks, encoding.gates, strict=True):
            y_hat[:, bank.writes] += DenseCodes(gate).decode(bank.W_dec.detach())
            if bank.W_skip is not None:
                y_hat[:, bank.writes] += x[:, bank.reads] @ bank.W_skip.detach()
        fit = losses.reconstruction(y - y_hat, y, self.cfg.reconstruction, self.dictionary.write_layout)
        return self.cfg.gate_coefficient * fit

    def _pre_activation(
        self, encoding: Encoding, x: Float[Tensor, "token d_reads"], dead: Bool[Tensor, "all_features"]
    ) -> Float[Tensor, ""] | None:
        """See `penalties.pre_activation`. Where the activation function compares z c, features weigh alike."""
        cfg, activation, banks = self.cfg, self.dictionary.activation, self.dictionary.banks
        if cfg.pre_activation_loss is PreActivationLoss.none:
            return None
        thetas = [activation.threshold[g] if isinstance(activation, JumpRelu) else 0.0 for g in range(len(banks))]
        weights = [None] * len(banks)
        if cfg.code_normalisation is CodeNormalisation.none:
            mixed = (cfg.mixed_weights[0], cfg.mixed_weights[1])
            weights = [bank.scale(cfg.penalty_normalisation, mixed) for bank in banks]
        if cfg.pre_activation_loss is PreActivationLoss.dead:
            mask = dead.split([bank.n_features for bank in banks])
            weights = [own if weight is None else own * weight for own, weight in zip(mask, weights, strict=True)]
        assert encoding.pres is not None, f"pre_activation_loss with {type(activation).__name__}"
        return cfg.pre_activation_coefficient * penalties.pre_activation(
            encoding.pres, thetas, encoding.scales, weights
        )

    def _revival(
        self,
        encoding: Encoding,
        x: Float[Tensor, "token d_reads"],
        residual: Float[Tensor, "token d_writes"],
        fit: Float[Tensor, ""],
        dead: Bool[Tensor, "all_features"],
    ) -> Float[Tensor, ""] | None:
        """Mean over groups, 0 for those without dead features; None, at no cost, before anything can be dead."""
        cfg, banks = self.cfg, self.dictionary.banks
        if cfg.dead not in (Dead.aux_k, Dead.ghost) or self._tokens_seen < cfg.dead_after_tokens:
            return None
        terms = []
        for g, own in enumerate(self._dead_of(dead)):
            if len(own) == 0:
                continue
            left, W_dec = residual[:, banks[g].writes], banks[g].W_dec[own]
            pre = dead_pre_activations(self.dictionary, x, g, own)
            if cfg.dead is Dead.ghost:
                terms.append(ghost(left, pre, W_dec, fit))
            else:
                c = encoding.scales[g]
                terms.append(aux_k(left, pre, None if c is None else c[own], W_dec, cfg.aux_k))
        return cfg.aux_coefficient * torch.stack(terms).sum() / len(banks) if terms else None

    def _resample(self, step: _Step) -> None:
        """Dead features start anew, with time to live."""
        dead = dead_features(self.tokens_since_fired, self.cfg.dead_after_tokens)
        self._resets = resample(self.dictionary, self._dead_of(dead), step.x, step.residual, self.cfg.resample_scale)
        if self.cfg.unit_norm_decoder:
            self._normalise_decoder()
        self.tokens_since_fired.masked_fill_(dead, 0)

    def _dead_of(self, dead: Bool[Tensor, "all_features"]) -> list[Int[Tensor, "_"]]:
        """Of each group."""
        return [own.nonzero().squeeze(1) for own in dead.split([bank.n_features for bank in self.dictionary.banks])]

    def _metrics(self, codes: Codes, dead: Bool[Tensor, "all_features"]) -> dict[str, Tensor]:
        """l0 of each group and their mean; share of features that are dead; k on its way."""
        l0 = codes.counts().float().mean(0)
        names = [bank.name for bank in self.dictionary.banks]
        each = {f"l0/{name}": l0[g] for g, name in enumerate(names)} if len(names) > 1 else {}
        activation = self.dictionary.activation
        if isinstance(activation, Selecting) and self.cfg.k_start is not None:
            each["k"] = torch.full_like(l0[0], sum(activation.k) / len(activation.k))
        return {"l0": l0.mean(), "dead": dead.float().mean(), **each}

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        for bank in self.dictionary.banks:
            bank.W_dec.div_(bank.W_dec.norm(dim=1, keepdim=True))
