"""sae-lens: SAETrainer.step over a TrainingSAE, evaluated as the SAE that it saves."""

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
    DType,
    Penalty,
    TrainingConfig,
)
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.peers import Peer, betas, check_shared, learning_rate


class SaeLens(Peer):
    def __init__(self, dictionary: SparseDictionary, cfg: DecompositionConfig, training: TrainingConfig) -> None:
        check_shared(dictionary, cfg)
        assert cfg.dead is Dead.none, (
            "sae-lens does not divide its auxiliary loss by the residual's variance: dead=none"
        )
        assert cfg.decoder is Decoder.free, "sae-lens leaves decoder norms free"
        bank = dictionary.banks[0]
        self.sae = self._sae(cfg, training.n_steps, dictionary)
        with torch.no_grad():
            self.sae.W_enc.copy_(bank.W_enc.T)
            self.sae.W_dec.copy_(bank.W_dec)
            self.sae.b_dec.copy_(dictionary.b_dec)
        trainer_config = importlib.import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=training.n_steps * training.batch_tokens,
            train_batch_size_samples=training.batch_tokens,
            lr=learning_rate(cfg, training),
            lr_end=learning_rate(cfg, training),
            lr_warm_up_steps=round(training.lr_warmup * training.n_steps),
            lr_decay_steps=round(training.lr_decay * training.n_steps),
            adam_beta1=betas(cfg, training)[0],
            adam_beta2=betas(cfg, training)[1],
            dead_feature_window=training.n_steps,
            device=str(dictionary.b_dec.device),
            autocast=training.autocast is DType.bfloat16,
        )
        assert training.clip_norm == 1.0, f"sae-lens clips at 1.0, not at {training.clip_norm}"
        trainers = importlib.import_module("sae_lens.training.sae_trainer")
        self.trainer = trainers.SAETrainer(trainer_config, self.sae, iter(()))

    def _sae(self, cfg: DecompositionConfig, n_steps: int, dictionary: SparseDictionary) -> Any:
        saes, (n_features, width) = importlib.import_module("sae_lens.saes"), dictionary.banks[0].W_enc.shape
        of_all: dict[str, Any] = {
            "device": str(dictionary.b_dec.device),
            "d_in": width,
            "d_sae": n_features,
            "apply_b_dec_to_input": cfg.centre_input,
            "decoder_init_norm": None,
        }
        of_topk = of_all | {
            "k": cfg.k,
            "aux_loss_coefficient": 0.0,
            "rescale_acts_by_decoder_norm": cfg.code_normalisation is CodeNormalisation.sae,
        }
        warmup = round(cfg.penalty_warmup * n_steps)
        match cfg.activation:
            case Activation.topk:
                return saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**of_topk))
            case Activation.batchtopk if cfg.matryoshka is None:
                return saes.BatchTopKTrainingSAE(
                    saes.BatchTopKTrainingSAEConfig(topk_threshold_lr=cfg.threshold_rate, **of_topk)
                )
            case Activation.batchtopk:
                assert cfg.matryoshka_weights == [1.0] * len(cfg.matryoshka or []), "sae-lens adds all prefixes"
                return saes.MatryoshkaBatchTopKTrainingSAE(
                    saes.MatryoshkaBatchTopKTrainingSAEConfig(
                        topk_threshold_lr=cfg.threshold_rate,
                        matryoshka_widths=widths(cfg),
                        **of_topk,
                    )
                )
            case Activation.jumprelu:
                assert cfg.penalty is Penalty.l0, f"penalty {cfg.penalty.value} is not among those handed over"
                return saes.JumpReLUTrainingSAE(
                    saes.JumpReLUTrainingSAEConfig(
                        jumprelu_init_threshold=cfg.jumprelu_threshold,
                        jumprelu_bandwidth=cfg.jumprelu_bandwidth,
                        l0_coefficient=cfg.penalty_coefficient,
                        l0_warm_up_steps=warmup,
                        **of_all,
                    )
                )
            case Activation.gated:
                assert (cfg.penalty, cfg.penalty_normalisation) == (Penalty.l1, CodeNormalisation.sae)
                assert cfg.gate_trains_decoder and cfg.gate_coefficient == 1.0, "its gate trains the decoder"
                return saes.GatedTrainingSAE(
                    saes.GatedTrainingSAEConfig(
                        l1_coefficient=cfg.penalty_coefficient, l1_warm_up_steps=warmup, **of_all
                    )
                )
            case other:
                raise AssertionError(f"sae-lens has no {other.value}")

    def step(self, rows: Float[Tensor, "token width"], step: int) -> None:
        self.trainer.step(rows)
        self.trainer.n_training_steps += 1  # what the library's own loop does after a step

    @torch.no_grad()
    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        saved = {name: tensor.clone() for name, tensor in self.sae.state_dict().items()}
        self.sae.process_state_dict_for_saving_inference(saved)
        made = importlib.import_module("sae_lens").SAE.from_dict(self.sae.cfg.get_inference_sae_cfg_dict())
        made.load_state_dict(saved)
        codes = made.encode(rows)
        return made.decode(codes), codes

    def weights(self) -> dict[str, Tensor]:
        own = {"W_enc": self.sae.W_enc.T, "W_dec": self.sae.W_dec, "b_dec": self.sae.b_dec}
        return {name: tensor.detach().clone() for name, tensor in own.items()}


def widths(cfg: DecompositionConfig) -> list[int]:
    """Features in each prefix."""
    shares = torch.tensor(cfg.matryoshka, dtype=torch.float64).cumsum(0)
    return [round(float(share) * cfg.n_features) for share in shares]
