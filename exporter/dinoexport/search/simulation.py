"""What a recipe does to a model, in PyTorch: fast enough to try many, and close to the artifact."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.collect import to_pixels
from dinoexport.quantize.pictures import Pixels
from dinoexport.quantize.prepare import Known, prepare_
from dinoexport.quantize.simulate import simulated
from dinoexport.recipes import Recipe

Outputs = dict[str, np.ndarray]
NOISE_SAMPLES = 12
"""Samples that noise is measured on: of half as many, mixtures came out 5 % larger."""


class Simulation:
    """Deploy models of one checkpoint, prepared for one recipe after another.

    Args:
        make: gives a fresh deploy model, unrounded.
        calibration: of it.
        samples: {input: (H, W, 3) uint8} each, that all recipes run on.
        known: weights that are quantised already, see ``prepare_``.
    """

    def __init__(
        self,
        make: Callable[[], DeployModel],
        calibration: Calibration,
        samples: Sequence[dict[str, Pixels]],
        known: Known | None = None,
    ) -> None:
        self._known = known
        self._make = make
        self._calibration = calibration
        self._samples = samples
        self.expected, self._logits = run_model(make(), samples)

    def run(self, recipe: Recipe) -> Outputs:
        """Return the outputs of a recipe, samples first."""
        return self._run(recipe, self._samples)[0]

    def noise(self, recipe: Recipe) -> float:
        """Return how noisy the outputs of a recipe are, on ``NOISE_SAMPLES``.

        The mean of squared differences over the variance, of outputs that are no whole numbers;
        where all are (a class map), of the logits.
        """
        outputs, logits = self._run(recipe, self._samples[:NOISE_SAMPLES])
        pairs = [
            (value[:NOISE_SAMPLES], outputs[name])
            for name, value in self.expected.items()
            if value.dtype.kind == "f"
        ] or [(self._logits[:NOISE_SAMPLES], logits)]
        return float(np.mean([_noise(wanted, found) for wanted, found in pairs]))

    def _run(
        self, recipe: Recipe, samples: Sequence[dict[str, Pixels]]
    ) -> tuple[Outputs, np.ndarray]:
        model = self._make()
        layers = prepare_(model, recipe, self._calibration, self._known)
        with simulated(model, layers):
            return run_model(model, samples)


def _noise(wanted: np.ndarray, found: np.ndarray) -> float:
    # A constant output, such as an interval's width, varies by nothing.
    variance = max(float(wanted.var()), float(np.finfo(np.float32).tiny))
    return float(((found - wanted) ** 2).mean()) / variance


@torch.no_grad()
def run_model(
    model: DeployModel, samples: Sequence[dict[str, Pixels]]
) -> tuple[Outputs, np.ndarray]:
    """Return outputs, {name: (samples, …)}, and flat logits of a model."""
    outputs: dict[str, list[np.ndarray]] = {}
    logits: list[np.ndarray] = []
    hook = model.head.register_forward_hook(
        lambda _module, _inputs, given: logits.append(given.reshape(-1).numpy())
    )
    for sample in samples:
        for name, value in model.run(tuple(to_pixels(model, sample)))[0].items():
            outputs.setdefault(name, []).append(value[0].numpy())
    hook.remove()
    return {name: np.stack(values) for name, values in outputs.items()}, np.stack(logits)
