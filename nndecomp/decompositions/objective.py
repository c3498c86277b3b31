"""What the training loop sees of a dictionary: a loss of raw rows, and what happens after each step.

The dictionary sees rows in the units of `nndecomp.decompositions.units`; `finished` folds these into the weights. All state
is in the module's state_dict, so a checkpoint of it is complete.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.activations.statistics import SiteScale
from nndecomp.config.schema import Dead, Decoder, DecompositionConfig, PreActivationLoss, TrainingConfig
from nndecomp.decompositions import archetypal, backends, losses, row_gradients, terms
from nndecomp.decompositions.activation_base import Selecting
from nndecomp.decompositions.codes import Encoding
from nndecomp.decompositions.dead import dead_features, families, fired_anywhere
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.resampling import Rows, resample
from nndecomp.decompositions.sparsity import Sparsity
from nndecomp.decompositions.start import Given, start
from nndecomp.decompositions.terms import Batch
from nndecomp.decompositions.units import Columns
from nndecomp.targets.base import Target
from nndecomp.types import Layout, Site


@dataclass
class _Step:
    """What after_step wants to know of the last loss."""

    encoding: Encoding
    fired: Bool[Tensor, "all_features"]
    x: RowsOrSequences
    residual: Float[Tensor, "token d_writes"]


class DictionaryObjective(nn.Module):
    """Trains one dictionary on rows of `layout`, which may hold other sites as well."""

    def __init__(
        self,
        dictionary: SparseDictionary,
        cfg: DecompositionConfig,
        layout: Layout,
        scales: Mapping[Site, SiteScale],
    ) -> None:
        super().__init__()
        self.dictionary, self.cfg, self.layout = dictionary, cfg, layout
        self._k = list(dictionary.activation.k) if isinstance(dictionary.activation, Selecting) else []
        device = dictionary.b_dec.device
        self.tokens_since_fired: Tensor
        self.reads = Columns(layout, dictionary.read_layout, scales).to(device)
        self.writes = Columns(layout, dictionary.write_layout, scales).to(device)
        n_features = sum(bank.n_features for bank in dictionary.banks)
        self.register_buffer("tokens_since_fired", torch.zeros(n_features, dtype=torch.int64, device=device))
        self.sparsity = Sparsity(cfg).to(device)
        self._families = families(dictionary)
        self._started = False
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

    def split(self, rows: RowsOrSequences) -> tuple[RowsOrSequences, Float[Tensor, "token d_writes"]]:
        """What is read, in sequences where it must be, and what is to be written, in the units of training."""
        x = self.reads(rows)
        y = x if self.reads.layout == self.writes.layout else self.writes(rows)
        return x if self.dictionary.needs_sequences else rows_of(x), rows_of(y)

    def start(self, rows: RowsOrSequences, target: Target | None = None, seed: int = 0) -> None:
        """What the settings say about the start, from rows and the target's own weights; once, before the first step. Without
        it training starts from its first batch.
        """
        assert self._tokens_seen == 0, f"a start after {self._tokens_seen} tokens of training"
        given = Given(*self.split(rows), self.reads, self.writes, target, seed)
        start(self.dictionary, self.cfg, given)
        self._started = True

    def loss(self, rows: RowsOrSequences, progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss of a batch and detached metrics. `progress`, from 0 to 1, drives the schedules of k and penalty."""
        if self.training and self._tokens_seen == 0 and not self._started:
            self.start(rows)
        x, y = self.split(rows)
        # An archetypal decoder is computed once a step: the first time, with its gradient.
        with parametrize.cached():
            decoders = [bank.W_dec for bank in self.dictionary.banks if self.cfg.decoder is Decoder.archetypal]
            assert all(W_dec.requires_grad for W_dec in decoders if torch.is_grad_enabled()), "decoders are trained"
            return self._loss(x, y, progress)

    def _loss(
        self, x: RowsOrSequences, y: Float[Tensor, "token d_writes"], progress: float
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        self._anneal_k(progress)
        encoding = self.dictionary.encoding(x, whole=self.cfg.pre_activation_loss is not PreActivationLoss.none)
        dead = dead_features(self.tokens_since_fired, self.cfg.dead_after_tokens)
        batch = Batch(self.dictionary, self.cfg, encoding, x, y)
        residual, fit = terms.fit(batch)
        parts = {
            "reconstruction": self.cfg.local_coefficient * fit,
            "gate": terms.gate(batch),
            "penalty": self.sparsity.term(self.dictionary, encoding, progress),
            "pre_activation": terms.pre_activation(batch, dead),
            "aux": self._revival(batch, residual, fit, dead),
        }
        parts = {name: term for name, term in parts.items() if term is not None}
        loss = torch.stack(list(parts.values())).sum()
        if self.training:
            self._step = _Step(encoding, encoding.codes.fired(), x, residual.detach())
        return loss, {
            "loss": loss.detach(),
            "fvu": losses.fvu(residual.detach(), y, self.dictionary.write_layout),
            **self._metrics(encoding, dead),
            **self.sparsity.metrics(progress),
            **{f"loss/{name}": term.detach() for name, term in parts.items()},
        }

    @torch.no_grad()
    @torch.no_grad()
    def before_step(self) -> None:
        """With unit-norm decoders: take away the part of the gradient that normalising would undo."""
        if not self.cfg.unit_norm_decoder:
            return
        for bank in self.dictionary.banks:
            row_gradients.make_tangent(bank.W_dec)

    def clipped_apart(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

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
        dictionary.fold(self.reads.s, self.writes.s, self.reads.m, self.writes.m)
        return dictionary

    def _anneal_k(self, progress: float) -> None:
        """From k_start to k in a straight line over the first k_anneal share of training."""
        activation, start = self.dictionary.activation, self.cfg.k_start
        if self.training and isinstance(activation, Selecting) and start is not None and self.cfg.k_anneal > 0:
            share = min(1.0, progress / self.cfg.k_anneal)
            activation.k = [round(start + share * (k - start)) for k in self._k]

    def _revival(
        self, batch: Batch, residual: Float[Tensor, "token d_writes"], fit: Float[Tensor, ""], dead: Bool[Tensor, "_"]
    ) -> Float[Tensor, ""] | None:
        """None, at no cost, before anything can be dead."""
        if self.cfg.dead not in (Dead.aux_k, Dead.ghost) or self._tokens_seen < self.cfg.dead_after_tokens:
            return None
        return terms.revival(batch, residual, fit, self._dead_of(dead))

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

    def _metrics(self, encoding: Encoding, dead: Bool[Tensor, "all_features"]) -> dict[str, Tensor]:
        """l0 of each group and their mean; share of features that are dead; k on its way; how exact screening was."""
        l0 = encoding.codes.counts().float().mean(0)
        names = [bank.name for bank in self.dictionary.banks]
        each = {f"l0/{name}": l0[g] for g, name in enumerate(names)} if len(names) > 1 else {}
        activation = self.dictionary.activation
        if isinstance(activation, Selecting) and self.cfg.k_start is not None:
            each["k"] = torch.full_like(l0[0], sum(activation.k) / len(activation.k))
        if encoding.agreement is not None:
            each["screening_agreement"] = torch.full_like(l0[0], encoding.agreement)
        return {"l0": l0.mean(), "dead": dead.float().mean(), **each}

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        for bank in self.dictionary.banks:
            backends.of(bank.W_dec).normalise(bank.W_dec)
