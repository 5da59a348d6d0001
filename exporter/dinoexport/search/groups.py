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


def raise_groups(
    base: Precision, groups: Sequence[str], precision: Precision, all_groups: Sequence[str] = ()
) -> Recipe:
    """Return the recipe that gives some groups another precision, by as few patterns as it takes.

    Groups that differ in their second part alone become one pattern: ``blocks.0-2+5.mlp``, and
    ``blocks.*.mlp`` where these are all.

    Args:
        base: of all other groups.
        groups: that are raised.
        precision: that they are raised to.
        all_groups: that there are; nothing spells every number out.
    """
    everywhere = _merge(all_groups)
    changes = []
    for (first, last), numbers in _merge(groups).items():
        if numbers == [""]:
            changes.append((first, precision))
            continue
        chosen = _spell(numbers)
        if len(numbers) > 1 and sorted(numbers) == sorted(everywhere.get((first, last), ())):
            chosen = "*"
        changes.append((f"{first}.{chosen}.{last}" if last else f"{first}.{chosen}", precision))
    return Recipe(base, tuple(changes))


def _merge(groups: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return {(first part, last part): the parts between them}."""
    merged: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        first, _, rest = group.partition(".")
        number, _, last = rest.partition(".")
        merged.setdefault((first, last), []).append(number)
    return merged


def _spell(parts: Sequence[str]) -> str:
    """Return one of several as a pattern has it, three and more in a row by their ends."""
    if not all(part.isdecimal() for part in parts):
        return "+".join(sorted(parts))
    runs: list[list[int]] = []
    for number in sorted(map(int, parts)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "+".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs
    )
