"""The exporter's branch of the exception tree, which starts in ``dinotrain.errors``.

DinoError
├── BuildError                  a model that cannot be captured, lowered or quantised
│   └── PassError               a pass that lacks what it requires, or failed
├── BundleError                 an artifact, a manifest or a package that is missing or corrupt
│   └── TamperedError           a bundle whose files are not those that were verified
└── ParityError                 an artifact that cannot be compared with its reference
    └── UnknownOperationError   a program holds an operation that no evaluator here knows
"""

from dinotrain.errors import DinoError


class BuildError(DinoError):
    """A model that cannot be captured, lowered or quantised."""


class PassError(BuildError):
    """A pass that lacks what it requires, or failed; says which ones ran before it."""


class BundleError(DinoError):
    """An artifact, a manifest or a package that is missing, corrupt or foreign."""


class TamperedError(BundleError):
    """A bundle whose files are missing, changed, or not those that its manifest names."""


class ParityError(DinoError):
    """An artifact that cannot be compared with its reference."""


class UnknownOperationError(ParityError):
    """A program holds an operation that no evaluator here knows, so nothing of it was run."""
