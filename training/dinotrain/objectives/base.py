"""What training asks of a model: a loss, the figure that validation watches, and a baseline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]
Predictions = dict[str, NDArray[Any]]
"""Named outputs of a model, samples first: float64, or whole numbers where the output has them."""


class Objective(ABC):
    """One objective, bound to the model that it trains."""

    error_name: str
    """What ``validation_error`` is, as progress shows it."""
    diagnoses: bool = False
    """Whether ``diagnose`` has something to say."""
    has_bits: bool = False
    """Whether logits are bits, whose probabilities ``bit_calibration`` can judge."""

    @abstractmethod
    def check(self, labels: Values) -> None:
        """Refuse (n, labels) training labels from which nothing can be learnt.

        Raises:
            DataError: the labels are too few.
        """

    @abstractmethod
    def start_(self, labels: Values) -> None:
        """Set what the model knows of its (n, labels) training labels before it trains."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits and (B, labels) float64, NaN where a label is missing → a scalar."""

    def bit_calibration(self, logits: Tensor, labels: Values) -> dict[str, list[float | None]]:
        """Return the calibration error of each bit, {output name: …}; see subclasses."""
        return {}

    def diagnose(
        self, logits: Tensor, labels: Tensor, embeddings: Sequence[Tensor]
    ) -> dict[str, float]:
        """Return figures that are reported and not trained on, {name: value}; see subclasses."""
        return {}

    @abstractmethod
    def validation_error(self, predicted: Predictions, true: NDArray[Any]) -> float | None:
        """Return the figure that stops training, lower is better; None where no label is."""

    @abstractmethod
    def baseline(self, labels: Values) -> dict[str, float]:
        """Return what a model without pictures would answer, {label: value}."""
