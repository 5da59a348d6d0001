"""Smoothing: outliers of activations go into weights, channel by channel, where int8 bears them.

    Before:  y = W x                    a few channels of x reach 100 times as far as the others
    After:   y = (W·s) (x/s)            1/s is folded into what gives x

Weights have a scale per output channel, activations one for all channels, so an outlier channel of
x costs every other channel its precision, and the same factor in W costs little.
Source: Xiao et al., "SmoothQuant" (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinoexport.quantize.calibration import Calibration, CalibrationSet
from dinoexport.quantize.collect import run_samples, watched
from dinoexport.quantize.layers import Weighted, weighted_layers
from dinoexport.quantize.links import Link, block_links
from dinoexport.quantize.simulate import round_int8
from dinoexport.quantize.weights import store_weight
from dinoexport.recipes import Activations, Precision, WeightKind

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""How much of a channel's reach goes into the weights; tried per link."""
WORTH = 0.5
"""Share of the squared error that must remain at most for an operation to be added."""
SEARCH_SAMPLES = 8
ROWS_PER_SAMPLE = 32
"""Tokens that errors are measured on, the one that reaches farthest among them."""
SEARCH_OUTPUTS = 512
"""Output channels of a layer that errors are measured on, at equal distances."""
MOST_EXPONENT = 10


@dataclass(frozen=True)
class Smoothed:
    """What was done to one link.

    Attributes:
        link: its name.
        alpha: that was best.
        error_before: squared error of the readers' outputs over their square, summed.
        error_after: with the factors.
    """

    link: str
    alpha: float
    error_before: float
    error_after: float


@torch.no_grad()
def smooth_(
    model: nn.Module, calibration: Calibration, precisions: Mapping[str, Precision]
) -> list[Smoothed]:
    """Smooth every layer whose activations are quantised, in place; the function stays the same.

    Factors are powers of two, so that every product is exact: at fp32 not one bit of an output
    changes, no rounding to half precision is added, and a converter that folds a factor on its own
    finds the numbers that PyTorch has.

    Args:
        model: a deploy model whose weights are not yet rounded.
        calibration: of this model.
        precisions: of its layers; others than those with integer activations are only followed.

    Returns:
        The links that changed, in running order.
    """
    modules = weighted_layers(model)
    links = [link for link in block_links(model) if _quantised(link.readers, precisions)]
    rows = sample_inputs(model, calibration.pictures, [n for link in links for n in link.readers])
    done = []
    for link in links:
        readers = [modules[name] for name in link.readers]
        wanted = _quantised(link.readers, precisions)
        judge = _Judge(
            [(modules[name], precisions[name], rows[name]) for name in wanted],
            *_extremes(link.readers, calibration),
        )
        before = judge.error(None)
        tried = {alpha: judge.factors(alpha) for alpha in ALPHAS}
        errors = {alpha: judge.error(factors) for alpha, factors in tried.items()}
        alpha = min(errors, key=errors.__getitem__)
        if errors[alpha] >= before * (1.0 if link.free else WORTH):
            continue
        apply_(link, readers, tried[alpha])
        done.append(Smoothed(link.name, alpha, before, errors[alpha]))
    return done


def apply_(link: Link, readers: Sequence[Weighted], factors: Tensor) -> None:
    """Divide a link's channels by factors and multiply what reads them, in place."""
    link.divide(factors)
    for reader in readers:
        reader.weight.mul_(factors)


def balance(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel: peak_x^α / peak_w^(1 − α), to the next power of two.

    Args:
        activations: (channels,) peaks.
        weights: (channels,) peaks over all readers and their outputs.
        alpha: 0 leaves the reach in the activations, 1 moves all of it.

    Returns:
        (channels,) float32; the median is 1 and dead channels have 1.
    """
    alive = (activations > 0) & (weights > 0)
    if not bool(alive.any()):
        return torch.ones_like(activations)
    ones = torch.ones_like(activations)
    logs = alpha * torch.where(alive, activations, ones).log2()
    logs = logs - (1 - alpha) * torch.where(alive, weights, ones).log2()
    logs = torch.where(alive, logs - logs[alive].median(), torch.zeros_like(logs))
    return torch.exp2(logs.round().clamp(-MOST_EXPONENT, MOST_EXPONENT))


def sample_inputs(
    model: nn.Module, pictures: CalibrationSet, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return some tokens that layers read: {layer: (rows, channels)}, drawn by the set's seed.

    Each run of a layer gives the token that reaches farthest and others at random.
    """
    modules = weighted_layers(model)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(pictures.seed)

    def note(name: str, read: Tensor, _given: Tensor) -> None:
        rows = read.reshape(-1, read.shape[-1])
        farthest = rows.abs().amax(dim=1).argmax().cpu()
        others = torch.randperm(len(rows), generator=generator)[: ROWS_PER_SAMPLE - 1]
        found[name].append(rows[torch.cat((farthest[None], others)).to(rows.device)])

    few = CalibrationSet(
        pictures.samples[:SEARCH_SAMPLES], pictures.source, pictures.seed, pictures.sha256
    )
    with watched({name: modules[name] for name in names}, note):
        run_samples(model, few)
    return {name: torch.cat(parts) for name, parts in found.items()}


class _Judge:
    """Measures what factors do to the layers that read one tensor."""

    def __init__(
        self,
        readers: Sequence[tuple[Weighted, Precision, Tensor]],
        low: Tensor,
        high: Tensor,
    ) -> None:
        self._low, self._high = low, high
        self._weights = torch.stack([m.weight.abs().amax(dim=0) for m, _, _ in readers]).amax(dim=0)
        self._parts = []
        for module, precision, rows in readers:
            step = -(-len(module.weight) // SEARCH_OUTPUTS)
            weight = module.weight[::step]
            wanted = rows @ weight.T
            self._parts.append((weight, precision, rows, wanted, float(wanted.square().mean())))

    def factors(self, alpha: float) -> Tensor:
        return balance(torch.maximum(-self._low, self._high), self._weights, alpha)

    def error(self, factors: Tensor | None) -> float:
        """Squared error over the square of what is wanted, summed over readers."""
        s = torch.ones_like(self._low) if factors is None else factors
        limits = (min(float((self._low / s).min()), 0.0), max(float((self._high / s).max()), 0.0))
        total = 0.0
        for weight, precision, rows, wanted, power in self._parts:
            if precision.kind is not WeightKind.FLOAT:
                values = store_weight((weight * s).cpu().numpy(), precision).values()
                scaled = torch.from_numpy(values).to(weight.device)
            else:
                scaled = weight * s
            given = round_int8(rows / s, limits) @ scaled.T
            total += float((given - wanted).square().mean()) / max(power, 1e-30)
        return total


def _quantised(names: Sequence[str], precisions: Mapping[str, Precision]) -> list[str]:
    return [n for n in names if precisions[n].activations is not Activations.FLOAT]


def _extremes(names: Sequence[str], calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Ends of each channel over all readers, of which one may see fewer tokens than another."""
    seen = [calibration.layers[name].input for name in names]
    low = torch.stack([torch.from_numpy(s.channel_minimum) for s in seen]).amin(dim=0)
    high = torch.stack([torch.from_numpy(s.channel_maximum) for s in seen]).amax(dim=0)
    return low, high
