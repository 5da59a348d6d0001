"""What an artifact gives, held against what its manifest promises: names, shapes and types."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinoexport.errors import BundleError
from dinotrain.tasks.base import OutputSpec


def check_outputs(
    outputs: Mapping[str, np.ndarray], promised: Sequence[OutputSpec], path: Path
) -> None:
    """Refuse an artifact that gives something else than what it is said to give.

    Args:
        outputs: of one run, {name: array}, as a runtime returns them.
        promised: of the manifest, in order.
        path: of the artifact, for the message.

    Raises:
        BundleError: a name, the order, a shape or a type differs.
    """
    if list(outputs) != [spec.name for spec in promised]:
        names = ", ".join(spec.name for spec in promised)
        raise BundleError(
            f"{path}: gives {', '.join(outputs)}, and {names} is promised in that order. "
            "Build it again."
        )
    for spec in promised:
        found = outputs[spec.name]
        if found.shape != spec.shape or found.dtype != np.dtype(spec.dtype):
            raise BundleError(
                f"{path}: {spec.name} is {found.dtype} {found.shape}, and {spec.dtype} "
                f"{spec.shape} is promised. Build it again."
            )
