"""How fast a stage of work goes, for the words beside its progress."""

import time
from collections.abc import Callable


class Pace:
    """Counts units of work from its making on.

    Args:
        unit: what is counted, in the plural.
        clock: gives seconds, from any start.
    """

    def __init__(self, unit: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._unit = unit
        self._clock = clock
        self._start = clock()

    def note(self, count: int) -> str:
        """Return ``12.3 pictures/s`` for units done since the start; nothing where it cannot tell.

        Args:
            count: of units, all of them since the start.
        """
        passed = self._clock() - self._start
        if count <= 0 or passed <= 0:
            return ""
        rate = count / passed
        return f"{rate:,.0f} {self._unit}/s" if rate >= 100 else f"{rate:.3g} {self._unit}/s"
