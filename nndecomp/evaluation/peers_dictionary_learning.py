"""dictionary-learning: <Trainer>.update, evaluated as its dictionary encodes by default."""

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
    Penalty,
    TrainingConfig,
)
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.peers import Peer, autocast, betas, check_shared, learning_rate

EVERY_STEP = -1  # it averages its threshold after steps greater than this


class DictionaryLearning(Peer):
    def __init__(self, dictionary: SparseDictionary, cfg: DecompositionConfig, training: TrainingConfig) -> None:
        check_shared(dictionary, cfg)
        assert cfg.decoder is Decoder.unit_norm, "dictionary-learning keeps decoder rows at norm 1"
        assert cfg.code_normalisation is CodeNormalisation.none
        bank = dictionary.banks[0]
        n_decay = round(training.lr_decay * training.n_steps)
        of_all = {
            "steps": training.n_steps,
            "activation_dim": bank.W_enc.shape[1],
            "dict_size": bank.n_features,
            "layer": 0,
            "lm_name": "",
            "device": str(dictionary.b_dec.device),
            "lr": learning_rate(cfg, training),
            "warmup_steps": round(training.lr_warmup * training.n_steps),
            "decay_start": training.n_steps - n_decay if n_decay else None,
        }
        self.trainer = self._trainer(cfg, training, of_all)
        self.ae = self.trainer.ae
        self.training, self.device = training, dictionary.b_dec.device
        linear = hasattr(self.ae, "encoder")
        with torch.no_grad():
            for name, rows in (("enc", bank.W_enc), ("dec", bank.W_dec.T)):
                own = getattr(self.ae, f"{name}oder").weight if linear else getattr(self.ae, f"W_{name}")
                own.copy_(rows if linear else rows.T)
            self._b_dec.copy_(dictionary.b_dec)
            if cfg.activation is Activation.jumprelu:
                self.ae.threshold.fill_(cfg.jumprelu_threshold)

    def _trainer(self, cfg: DecompositionConfig, training: TrainingConfig, of_all: dict[str, Any]) -> Any:
        trainers = importlib.import_module("dictionary_learning.trainers")
        warmup = round(cfg.penalty_warmup * training.n_steps)
        penalised = of_all | {"sparsity_warmup_steps": warmup}
        of_topk = of_all | {
            "k": cfg.k,
            "auxk_alpha": cfg.aux_coefficient if cfg.dead is Dead.aux_k else 0.0,
            "threshold_beta": 1 - cfg.threshold_rate,
            "threshold_start_step": EVERY_STEP,
        }
        match cfg.activation:
            case Activation.topk:
                made = trainers.TopKTrainer(**of_topk)
            case Activation.batchtopk if cfg.matryoshka is None:
                made = trainers.BatchTopKTrainer(**of_topk)
            case Activation.batchtopk:
                # It takes the mean over prefixes of their weighted losses, where others take the sum.
                shares = cfg.matryoshka or []
                weights = [w * len(shares) for w in cfg.matryoshka_weights or [1 / len(shares)] * len(shares)]
                nested = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
                made = nested.MatryoshkaBatchTopKTrainer(group_fractions=shares, group_weights=weights, **of_topk)
            case Activation.jumprelu:
                assert cfg.penalty is Penalty.l0_target and cfg.dead is Dead.none
                assert betas(cfg, training) == (0.0, 0.999), "its betas cannot be set"
                made = trainers.JumpReluTrainer(
                    bandwidth=cfg.jumprelu_bandwidth,
                    sparsity_penalty=cfg.penalty_coefficient,
                    target_l0=cfg.penalty_target,
                    **penalised,
                )
            case Activation.gated:
                assert (cfg.penalty, cfg.penalty_normalisation) == (Penalty.l1, CodeNormalisation.none)
                assert not cfg.gate_trains_decoder and cfg.gate_coefficient == 1.0, "its gate leaves the decoder alone"
                assert cfg.dead is Dead.none and training.clip_norm is None, "it clips no gradients and revives nothing"
                assert betas(cfg, training) == (0.0, 0.999), "its betas cannot be set"
                return trainers.GatedSAETrainer(l1_penalty=cfg.penalty_coefficient, **penalised)
            case other:
                raise AssertionError(f"dictionary-learning has no {other.value}")
        assert training.clip_norm == 1.0, f"dictionary-learning clips at 1.0, not at {training.clip_norm}"
        made.dead_feature_threshold, made.top_k_aux = cfg.dead_after_tokens, cfg.aux_k
        return made

    @property
    def _b_dec(self) -> Tensor:
        return self.ae.decoder_bias if hasattr(self.ae, "decoder_bias") else self.ae.b_dec

    def step(self, rows: Float[Tensor, "token width"], step: int) -> None:
        """With autocast as its own `trainSAE` has it, on a GPU and here on the CPU too."""
        with autocast(self.training, self.device):
            self.trainer.update(step, rows)

    @torch.no_grad()
    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        return self.ae(rows, output_features=True)

    def weights(self) -> dict[str, Tensor]:
        linear = hasattr(self.ae, "encoder")
        W_enc = self.ae.encoder.weight if linear else self.ae.W_enc.T
        W_dec = self.ae.decoder.weight.T if linear else self.ae.W_dec
        own = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": self._b_dec}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    def count_before_the_jump(self) -> None:
        """JumpReLU: L0 is counted on pre-activations, as in Rajamanoharan et al. 2024, eq. 10.

        The library counts it on activations that have jumped already, which takes what lies just below a threshold out
        of the kernel's window. With this its objective is the paper's, and nothing else changes.
        """
        jumprelu = importlib.import_module("dictionary_learning.trainers.jumprelu")
        trainer, ae = self.trainer, self.ae

        def loss(x: Tensor, step: int, **_: Any) -> Tensor:
            z = x @ ae.W_enc + ae.b_enc
            codes = jumprelu.JumpReLUFunction.apply(z, ae.threshold, trainer.bandwidth)
            l0 = jumprelu.StepFunction.apply(z, ae.threshold, trainer.bandwidth).sum(-1).mean()
            penalty = (
                trainer.sparsity_coefficient * trainer.sparsity_warmup_fn(step) * (l0 / trainer.target_l0 - 1) ** 2
            )
            return (x - ae.decode(codes)).square().sum(-1).mean() + penalty

        trainer.loss = loss
