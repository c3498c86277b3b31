"""eai-sparsify: the body of its Trainer.fit for one batch, without a model in front of it."""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import (
    Activation,
    CodeNormalisation,
    Dead,
    Decoder,
    DecompositionConfig,
    Optimizer,
    Reconstruction,
    TrainingConfig,
)
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.peers import Peer, autocast, betas, learning_rate


class Sparsify(Peer):
    """Its trainer can only be made with a language model, so that a step is spelt out here, with the library's defaults: no
    auxiliary losses, no clipping, and by `optimizer` Adam, or sign descent without a schedule, which is its default."""

    def __init__(self, dictionary: SparseDictionary, cfg: DecompositionConfig, training: TrainingConfig) -> None:
        assert len(dictionary.banks) == 1 and dictionary.reads == dictionary.writes, "it trains SAEs of one site"
        assert cfg.activation is Activation.topk, f"sparsify has no {cfg.activation.value}"
        assert cfg.reconstruction is Reconstruction.normalised, "it minimises the fraction of variance unexplained"
        assert cfg.decoder is Decoder.unit_norm and cfg.centre_input and cfg.dead is Dead.none
        assert cfg.code_normalisation is CodeNormalisation.none
        assert training.clip_norm is None, f"sparsify clips no gradients, but training.clip_norm={training.clip_norm}"
        bank = dictionary.banks[0]
        sparsify = importlib.import_module("sparsify")
        settings = sparsify.SparseCoderConfig(num_latents=bank.n_features, k=cfg.k)
        self.sae: Any = sparsify.SparseCoder(bank.W_enc.shape[1], settings, dictionary.b_dec.device, torch.float32)
        with torch.no_grad():
            for own, ours in (
                (self.sae.encoder.weight, bank.W_enc),
                (self.sae.encoder.bias, bank.b_enc),
                (self.sae.W_dec, bank.W_dec),
                (self.sae.b_dec, dictionary.b_dec),
            ):
                own.copy_(ours)
        self.optimiser, self.scheduler = self._optimiser(cfg, training)
        n = bank.n_features
        self.tokens_since_fired, self.fired = (
            torch.zeros(n, dtype=dtype, device=dictionary.b_dec.device) for dtype in (torch.long, torch.bool)
        )
        self.training, self.device = training, dictionary.b_dec.device

    def _optimiser(self, cfg: DecompositionConfig, training: TrainingConfig) -> tuple[Any, Any]:
        lr = learning_rate(cfg, training)
        match cfg.optimizer or training.optimizer:
            case Optimizer.adam:
                adam = torch.optim.Adam(self.sae.parameters(), lr=lr, betas=betas(cfg, training))
                schedules = importlib.import_module("transformers")
                n_warmup = round(training.lr_warmup * training.n_steps)
                return adam, schedules.get_linear_schedule_with_warmup(adam, n_warmup, training.n_steps)
            case Optimizer.sign:
                sign = importlib.import_module("sparsify.sign_sgd").SignSGD(self.sae.parameters(), lr=lr)
                made = importlib.import_module("schedulefree").ScheduleFreeWrapper(sign, momentum=0.95)
                made.train()
                return made, None
            case other:
                raise AssertionError(f"sparsify has no {other.value}")

    def step(self, rows: Float[Tensor, "token width"], step: int) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        total_variance = (rows - rows.mean(0)).pow(2).sum()
        with autocast(
            self.training, self.device
        ):  # on a GPU its own forward pass is in bfloat16, whatever is asked for
            out = self.sae(x=rows, y=rows, dead_mask=None, total_variance=total_variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it reads its metrics at every step
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.tokens_since_fired += len(rows)
        self.tokens_since_fired[self.fired] = 0
        self.fired.zero_()

    @torch.no_grad()
    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        out = self.sae(x=rows)
        codes = rows.new_zeros(len(rows), self.sae.num_latents)
        return out.sae_out, codes.scatter_(1, out.latent_indices, out.latent_acts)

    def weights(self) -> dict[str, Tensor]:
        own = {"W_enc": self.sae.encoder.weight, "W_dec": self.sae.W_dec, "b_dec": self.sae.b_dec}
        return {name: tensor.detach().clone() for name, tensor in own.items()}
