"""What a recipe does to a model, in PyTorch: fast enough to try many, and close to the artifact."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dinoexport.graph.deploy_model import DeployModel
from dinoexport.quantize.calibration import Calibration
from dinoexport.quantize.collect import to_pixels
from dinoexport.quantize.pictures import Pixels
from dinoexport.quantize.prepare import prepare_
from dinoexport.quantize.simulate import simulated
from dinoexport.recipes import Recipe

Outputs = dict[str, np.ndarray]


class Simulation:
    """Deploy models of one checkpoint, prepared for one recipe after another.

    Args:
        make: gives a fresh deploy model, unrounded.
        calibration: of it.
        samples: {input: (H, W, 3) uint8} each, that all recipes run on.
    """

    def __init__(
        self,
        make: Callable[[], DeployModel],
        calibration: Calibration,
        samples: Sequence[dict[str, Pixels]],
    ) -> None:
        self._make = make
        self._calibration = calibration
        self._samples = samples
        self.expected, self._features = _run(make(), samples)

    def run(self, recipe: Recipe) -> tuple[Outputs, float]:
        """Return the outputs of a recipe, samples first, and the noise at the last tap: the mean
        of squared differences over that of squares.
        """
        model = self._make()
        layers = prepare_(model, recipe, self._calibration)
        with simulated(model, layers):
            outputs, features = _run(model, self._samples)
        noise = ((features - self._features) ** 2).mean() / (self._features**2).mean()
        return outputs, float(noise)


@torch.no_grad()
def _run(model: DeployModel, samples: Sequence[dict[str, Pixels]]) -> tuple[Outputs, np.ndarray]:
    outputs: dict[str, list[np.ndarray]] = {}
    features = []
    for sample in samples:
        got, taps = model.run(tuple(to_pixels(model, sample)))
        for name, value in got.items():
            outputs.setdefault(name, []).append(value[0].numpy())
        features.append(taps[model.tap_names[-1]].reshape(-1).numpy())
    return {name: np.stack(values) for name, values in outputs.items()}, np.stack(features)
