"""Which recipes are worth building: each precision alone, and with its most sensitive groups raised
as far as the budget wants.

Simulation in PyTorch proposes; only artifacts that were built and run are believed.
"""

from collections.abc import Callable, Mapping, Sequence

from dinoexport.recipes import PRECISIONS, Activations, Precision, Recipe, parse_recipe
from dinoexport.search.groups import raise_groups
from dinotrain.errors import UsageError

SHARE = 0.8
"""Of the budget, which a simulated mixture may take: artifacts differ a little, and so do new
pictures."""

_FINER = ("w4-block32", "pal4", "pal6", "w8", "pal8", "fp16")
"""What a group is raised to: the next behind its own that the target has."""


def ladder(supported: Sequence[str]) -> list[Precision]:
    """Return the quantised precisions that a search starts from, small and coarse ones first.

    16-bit activations are left out: they are neither smaller nor, anywhere seen, faster.
    """
    chosen = [
        PRECISIONS[name]
        for name in supported
        if not PRECISIONS[name].is_float and PRECISIONS[name].activations is not Activations.INT16
    ]
    return sorted(chosen, key=lambda p: (p.bits, p.activations is Activations.FLOAT))


def finer(precision: Precision, supported: Sequence[str]) -> Precision:
    """Return what a group is raised to: float activations first, then more bits, fp16 at last."""
    if precision.activations is not Activations.FLOAT:
        return PRECISIONS["w8" if "w8" in supported else "fp16"]
    behind = _FINER[_FINER.index(precision.name) + 1 :]
    wanted = [PRECISIONS[name] for name in behind if name in supported]
    more = [p for p in wanted if p.bits > precision.bits]
    return more[0] if more else PRECISIONS["fp16"]


def propose_mixture(
    base: Precision,
    raised: Precision,
    worth: Mapping[str, float],
    limit: float,
    drop_of: Callable[[Recipe], float],
    least: int = 0,
) -> Recipe | None:
    """Return the mixture that raises as few groups as hold a limit, those of most worth first.

    Args:
        base: of all other groups.
        raised: of the raised ones.
        worth: {group: how much it disturbs the model at ``base``, for each weight it has}.
        limit: in the unit of ``drop_of``.
        drop_of: what a recipe loses in simulation.
        least: groups to raise at least.

    Returns:
        The mixture, ``base`` alone where that holds; None where raising every group but one does
        not hold.
    """
    order = sorted(worth, key=lambda group: -worth[group])

    def mixture(count: int) -> Recipe:
        return raise_groups(base, order[:count], raised, order)

    def holds(count: int) -> bool:
        return drop_of(mixture(count)) <= limit

    low, high = least - 1, len(order) - 1
    if low >= high or not holds(high):
        return None
    # The drop falls, near enough, with each raised group: between low, which fails, and high.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    # A name that is too long becomes shorter where more groups are raised: all of a kind are one *.
    named = (count for count in range(high, len(order)) if _has_name(mixture(count)))
    return next((mixture(count) for count in named if count == high or holds(count)), None)


def _has_name(recipe: Recipe) -> bool:
    try:
        parse_recipe(recipe.name)
    except UsageError:
        return False
    return True
