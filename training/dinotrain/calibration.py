"""From predictions on held-out subjects to the constants of intervals, after training.

Source: METHODS B8.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dinotrain.errors import DataError
from dinotrain.intervals import Intervals
from dinotrain.metrics.uncertainty import conformal_factor
from dinotrain.tasks.base import TargetSpec


def calibrate(
    predicted: Mapping[str, NDArray[np.floating]],
    true: NDArray[np.floating],
    subjects: Sequence[Hashable],
    coverage: float,
    targets: Sequence[TargetSpec],
) -> tuple[Intervals | None, str]:
    """Widen intervals until they hold on held-out subjects (split conformal).

    They scale with the standard deviation where the model states one, unless some of it is 0, as
    that of members which agree in every hard bit: no factor can widen that.

    Args:
        predicted: {output name: (n,)}, what the model gives without intervals.
        true: (n, targets); NaN where there is no label.
        subjects: (n,), who each row is of. No one of them may have been trained on.
        coverage: 1 − α, between 0 and 1.
        targets: names of the columns.

    Returns:
        The intervals and nothing, or None and the reason: too few labelled subjects of a target.

    Raises:
        UsageError: ``coverage`` is not between 0 and 1.
        ShapeError: lengths differ.
    """
    stds = [predicted.get(target.std_name) for target in targets]
    scaled = all(std is not None and (std > 0).all() for std in stds)
    found = []
    for column, target in enumerate(targets):
        try:
            factor = conformal_factor(
                predicted[target.output_name],
                true[:, column],
                subjects,
                coverage,
                stds[column] if scaled else None,
            )
        except DataError as error:
            return None, f"no intervals: {target.output_name}: {error}"
        found.append(factor)
    return Intervals(
        method="scaled" if scaled else "absolute",
        coverage=coverage,
        factors=tuple(factor.factor for factor in found),
        subjects=tuple(factor.subjects for factor in found),
    ), ""
