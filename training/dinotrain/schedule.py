"""How learning rates go over the steps of a run. Source: METHODS B7, C, D."""

import math

from dinotrain.train_config import TrainConfig


def rate_factor(config: TrainConfig, epochs_done: float) -> float:
    """Return the factor on every base rate, between ``min_lr / lr`` and 1, from 0 in warm-up.

    Args:
        config: schedule, epochs, warm-up, floor.
        epochs_done: since the start, with the part of the running epoch.
    """
    if epochs_done < config.warmup_epochs:
        return epochs_done / config.warmup_epochs
    done = epochs_done - config.warmup_epochs
    total = max(config.epochs - config.warmup_epochs, 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return 1.0 if done < total / 2 else 0.1
    if config.schedule == "sgdr":
        done, total = _since_restart(config, done)
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done / total))


def _since_restart(config: TrainConfig, done: float) -> tuple[float, float]:
    """Return the epochs since the last restart, and the length of the running period."""
    period = float(config.restart_epochs or max(config.epochs // 3, 1))
    while done >= period:
        done -= period
        period *= config.restart_mult
    return done, period
