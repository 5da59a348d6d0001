"""Intervals around measured values: constants that a model's configuration carries.

``calibration`` makes them from predictions on held-out subjects, and ``MeasureDecoder`` holds them
in the deploy graph. Source: METHODS B8.
"""

from typing import Literal

import msgspec

from dinotrain.errors import UsageError

MAX_FACTOR = 3e38
"""What float32 can hold."""


class Intervals(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One interval per target: ŷ ± factor (``absolute``) or ŷ ± factor·σ̂ (``scaled``).

    A factor of ``absolute`` is a half width in the target's unit.
    """

    method: Literal["absolute", "scaled"]
    coverage: float
    """How often an interval holds all values that one new subject has of its target."""
    factors: tuple[float, ...]
    """One per target, in the order of the logits."""
    subjects: tuple[int, ...]
    """How many subjects each factor was calibrated on."""

    def __post_init__(self) -> None:
        """Refuse what is no interval."""
        if not 0 < self.coverage < 1:
            raise UsageError(
                f"intervals have coverage {self.coverage}; between 0 and 1 is accepted"
            )
        if len(self.factors) != len(self.subjects) or not self.factors:
            raise UsageError(
                f"intervals have {len(self.factors)} factors and {len(self.subjects)} numbers of "
                "subjects; there is one of each per target"
            )
        bad = [factor for factor in self.factors if not 0 <= factor <= MAX_FACTOR]
        if bad:
            raise UsageError(f"an interval has factor {bad[0]}; 0 and above are accepted")
