"""Groups of layers that change their precision together, so that names of recipes stay short."""

from collections.abc import Iterable, Sequence

from dinoexport.recipes import Precision, Recipe

_DEPTH = {"blocks": 3, "net": 3}
"""Parts of a name that make a group: ``blocks.5.mlp``; one for all else, such as ``head``."""


def group_of(layer: str) -> str:
    """Return the group of a layer, which is a pattern that fits it."""
    parts = layer.split(".")
    return ".".join(parts[: _DEPTH.get(parts[0], 1)])


def group_layers(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return {group: its layers}, in running order."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer), []).append(layer)
    return groups


def raise_groups(base: Precision, groups: Sequence[str], precision: Precision) -> Recipe:
    """Return the recipe that gives some groups another precision, by as few patterns as it takes.

    Groups that differ in their second part alone become one pattern: ``blocks.2+5.mlp``.
    """
    merged: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        first, _, rest = group.partition(".")
        number, _, last = rest.partition(".")
        merged.setdefault((first, last), []).append(number)
    changes = []
    for (first, last), numbers in merged.items():
        if numbers == [""]:
            changes.append((first, precision))
            continue
        chosen = "+".join(sorted(numbers, key=lambda n: (len(n), n)))
        changes.append((f"{first}.{chosen}.{last}" if last else f"{first}.{chosen}", precision))
    return Recipe(base, tuple(changes))
