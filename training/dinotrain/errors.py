"""The exception tree of the whole project; every error that a user can mend is one of these.

    DinoError                 message: what failed · the value · what is accepted · the next step
    ├── UsageError            an argument or a name that is not accepted
    ├── ShapeError            a tensor or an image size that does not fit
    ├── CheckpointError       a checkpoint that is missing, corrupt, foreign or of another version
    ├── WeightsError          backbone weights in no known layout, or of another architecture
    ├── DownloadError         a hub that cannot be reached, or a file whose digest is wrong
    ├── DataError             a manifest, an image or a label that cannot be used
    └── dinoexport.errors     (the exporter adds BuildError, BundleError and ParityError)

It stands in the lowest layer because imports run only backwards along the data flow.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class DinoError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""


class UsageError(DinoError):
    """An argument or a name that is not accepted."""


class ShapeError(DinoError):
    """A tensor or an image size that does not fit."""


class CheckpointError(DinoError):
    """A checkpoint that is missing, corrupt, foreign or of another version."""


class WeightsError(DinoError):
    """Backbone weights in no known layout, or not matching their architecture."""


class DownloadError(DinoError):
    """A hub that cannot be reached, or a file whose digest is wrong."""


class DataError(DinoError):
    """A manifest, an image or a label that cannot be used."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not in ``known``, with the nearest known one."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")
