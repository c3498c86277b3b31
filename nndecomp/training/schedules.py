"""The learning rate as a pure function of the step."""

import math

from nndecomp.config.schema import LrSchedule, TrainingConfig


def learning_rate(step: int, cfg: TrainingConfig) -> float:
    """Learning rate of step `step` = 0 .. n_steps - 1:  lr * min(1, (step + 1) / n_warmup) * decay(step).

    Neither the first step nor the last one is lost to a rate of zero. With n = n_steps and e = lr_end:

        constant   decay = 1
        linear     decay = e + (1 - e) (n - step) / n_decay        over the last n_decay steps, 1 before
        cosine     decay = e + (1 - e) (1 + cos(pi t)) / 2         t = share of the steps after warm-up already made
    """
    n_steps = cfg.n_steps
    assert 0 <= step < n_steps, f"step {step} is not one of {n_steps}"
    n_warmup = round(cfg.lr_warmup * n_steps)
    n_decay = round(cfg.lr_decay * n_steps)
    rise = min(1.0, (step + 1) / n_warmup) if n_warmup else 1.0
    match cfg.lr_schedule:
        case LrSchedule.constant:
            share = 1.0
        case LrSchedule.linear:
            share = min(1.0, (n_steps - step) / n_decay) if n_decay else 1.0
        case LrSchedule.cosine:
            share = (1 + math.cos(math.pi * max(0, step - n_warmup) / max(1, n_steps - n_warmup))) / 2
    return cfg.lr * rise * (cfg.lr_end + (1 - cfg.lr_end) * share)
