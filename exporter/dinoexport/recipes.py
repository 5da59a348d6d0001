"""The vocabulary of precisions: each recipe can be read from its name, which is the same on the
command line, in file names and in manifests.

    w8a8                              int8 weights, int8 activations
    w8a8:blocks.5.mlp=fp16            …but the MLP of block 5 in half precision
    w8a8:smooth,blocks.*.mlp.fc2=w8   …smoothed, and every fc2 with float activations
    w8:blocks.2+5.attn=fp16           …the attention of blocks 2 and 5 in half precision
    w8:blocks.0-3+9.attn=fp16         …of blocks 0, 1, 2, 3 and 9
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from dinotrain.errors import UsageError, unknown_name

BLOCK = 32
"""Inputs that share a scale in ``w4-block32``."""

PALETTE_GROUP = 16
"""Output channels that share a palette."""

MAX_NAME = 120
"""Characters of a recipe's name, which is part of a file's."""


class Activations(Enum):
    """How the input of a layer is held while it is multiplied."""

    FLOAT = "float"
    INT8 = "int8, by ranges of calibration"
    INT8_DYNAMIC = "int8, by the range of each picture"
    INT16 = "int16, by ranges of calibration"


class WeightKind(Enum):
    """How weights are stored."""

    FLOAT = "float"
    INT = "integers with scales"
    PALETTE = "indices into tables"


@dataclass(frozen=True)
class Precision:
    """One word of the vocabulary: how a layer is stored and multiplied.

    Attributes:
        name: as it is written.
        kind: of the weights.
        bits: of one weight.
        block: inputs that share a scale; 0 where an output channel has one.
        activations: of the layer's input.
        costs: what to expect, in a line.
    """

    name: str
    kind: WeightKind
    bits: int
    costs: str
    block: int = 0
    activations: Activations = Activations.FLOAT

    @property
    def is_float(self) -> bool:
        """True for fp32 and fp16: nothing is quantised."""
        return self.kind is WeightKind.FLOAT

    @property
    def calibrated(self) -> bool:
        """True if ranges of activations are wanted before it can be built."""
        return self.activations in (Activations.INT8, Activations.INT16)

    def weights_only(self) -> "Precision":
        """Return the precision of the same weights with float activations."""
        return PRECISIONS["w8"] if self.activations is not Activations.FLOAT else self


_INT, _PALETTE, _FLOAT = WeightKind.INT, WeightKind.PALETTE, WeightKind.FLOAT
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", _FLOAT, 32, "twice the size of fp16"),
        Precision("fp16", _FLOAT, 16, "rounding of 11 bits"),
        Precision("w8", _INT, 8, "half the size of fp16; arithmetic stays float"),
        Precision(
            "w8a8",
            _INT,
            8,
            "needs calibration; ruins backbones with outlier channels unless smoothed",
            activations=Activations.INT8,
        ),
        Precision(
            "w8a8-dynamic",
            _INT,
            8,
            "ranges are found while it runs",
            activations=Activations.INT8_DYNAMIC,
        ),
        Precision(
            "w8a16",
            _INT,
            8,
            "needs calibration; slower than float on most processors",
            activations=Activations.INT16,
        ),
        Precision("w4-block32", _INT, 4, "a quarter of the size; large errors", block=BLOCK),
        Precision("pal8", _PALETTE, 8, "half the size of fp16; arithmetic stays float"),
        Precision("pal6", _PALETTE, 6, "three eighths of the size of fp16"),
        Precision("pal4", _PALETTE, 4, "a quarter of the size; large errors"),
    )
}

MODIFIERS = {
    "smooth": "move outliers of activations into weights (SmoothQuant)",
    "outliers": "keep the input channels that reach farthest in half precision",
    "bias": "correct the mean error of each layer in its bias",
}
"""What may stand behind a colon besides layers, in the order in which it is done."""

_PATTERN = re.compile(r"[a-z0-9_*+-]+(\.[a-z0-9_*+-]+)*")
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Recipe:
    """A precision for all layers, changes for some, and what is done to the model before.

    Attributes:
        base: of every layer that no change names.
        changes: (pattern of layer names, precision); of several that fit, the last one holds.
        modifiers: of ``MODIFIERS``, in that order.
    """

    base: Precision
    changes: tuple[tuple[str, Precision], ...] = ()
    modifiers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The one spelling of this recipe; ``parse_recipe`` reads it back."""
        parts = [*self.modifiers, *(f"{pattern}={p.name}" for pattern, p in self.changes)]
        return f"{self.base.name}:{','.join(parts)}" if parts else self.base.name

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision that occurs, once."""
        return tuple(dict.fromkeys([self.base, *(precision for _, precision in self.changes)]))

    @property
    def is_float(self) -> bool:
        """True if nothing is quantised."""
        return all(precision.is_float for precision in self.precisions)

    @property
    def calibrated(self) -> bool:
        """True if it cannot be built without calibration."""
        return bool(self.modifiers) or any(p.calibrated for p in self.precisions)

    def assign(self, layers: Iterable[str]) -> dict[str, Precision]:
        """Return the precision of each layer.

        Args:
            layers: names, such as ``blocks.5.mlp.fc1``. A pattern fits a layer whose first parts
                it fits: ``blocks.5.mlp`` is ``blocks.5.mlp.fc1`` and ``blocks.5.mlp.fc2``;
                ``*`` stands for anything within a part, ``2+5`` for one of several, ``2-5`` for
                one from 2 to 5.

        Raises:
            UsageError: a pattern fits no layer.
        """
        names = list(layers)
        result = dict.fromkeys(names, self.base)
        for pattern, precision in self.changes:
            found = [name for name in names if _fits(pattern, name)]
            if not found:
                raise UsageError(
                    f"--precision {self.name}: no layer of this model is called '{pattern}'; "
                    f"its layers are {_summary(names)}. See `dinoexport inspect CHECKPOINT`."
                )
            result |= dict.fromkeys(found, precision)
        return result


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from its name.

    Raises:
        UsageError: an unknown precision or modifier, a malformed pattern, or a name that is too
            long for a file's.
    """
    head, colon, tail = text.partition(":")
    base = _precision(head)
    if not colon:
        return Recipe(base)
    modifiers, changes = set(), []
    for part in tail.split(","):
        pattern, equals, name = part.partition("=")
        if not equals and pattern in MODIFIERS:
            modifiers.add(pattern)
            continue
        if not equals or not _PATTERN.fullmatch(pattern):
            raise UsageError(
                f"--precision {text}: '{part}' is neither one of {', '.join(MODIFIERS)} nor "
                "LAYER=PRECISION, such as blocks.5.mlp=fp16."
            )
        changes.append((pattern, _precision(name)))
    recipe = Recipe(base, tuple(changes), tuple(m for m in MODIFIERS if m in modifiers))
    if len(recipe.name) > MAX_NAME:
        raise UsageError(
            f"--precision: a recipe of {len(recipe.name)} characters does not fit into a file "
            f"name; {MAX_NAME} do. Use patterns such as blocks.*.mlp=fp16."
        )
    if recipe.modifiers and all(p.activations is Activations.FLOAT for p in recipe.precisions):
        raise UsageError(
            f"--precision {text}: {recipe.modifiers[0]} is for quantised activations, and all of "
            "these are float. Use w8a8, w8a8-dynamic or w8a16, or leave it out."
        )
    return recipe


def nearest(precision: Precision, supported: Mapping[str, str] | Iterable[str]) -> str:
    """Return the supported precision that is most like another one.

    Weights of as many bits come first, then as many bits of activations, then the same kind.
    """

    def distance(name: str) -> tuple[int, int, int]:
        other = PRECISIONS[name]
        return (
            abs(other.bits - precision.bits),
            abs(_activation_bits(other) - _activation_bits(precision)),
            int(other.kind is not precision.kind),
        )

    return min(supported, key=distance)


def _activation_bits(precision: Precision) -> int:
    if precision.activations is Activations.FLOAT:
        return 24
    return 16 if precision.activations is Activations.INT16 else 8


def _precision(name: str) -> Precision:
    if name not in PRECISIONS:
        raise unknown_name("precision", name, list(PRECISIONS))
    return PRECISIONS[name]


def _fits(pattern: str, layer: str) -> bool:
    wanted, parts = pattern.split("."), layer.split(".")
    return len(wanted) <= len(parts) and all(
        any(_is_one(part, choice) for choice in choices.split("+"))
        for part, choices in zip(parts, wanted, strict=False)
    )


def _is_one(part: str, choice: str) -> bool:
    ends = _RANGE.fullmatch(choice)
    if ends is None:
        return fnmatchcase(part, choice)
    return part.isdecimal() and int(ends[1]) <= int(part) <= int(ends[2])


def _summary(names: list[str]) -> str:
    shown = names if len(names) <= 4 else [*names[:2], "…", *names[-2:]]
    return ", ".join(shown)
