"""Which iOS a package needs: what the user asks for, or the first one that knows its recipe."""

from dinoexport.recipes import Recipe
from dinoexport.targets.base import LowerOptions

_FIRST_IOS = {"w8a8": 17, "w4-block32": 18, "pal8": 18, "pal6": 18, "pal4": 18}
"""iOS 17 has int8 activations, iOS 18 blocks of 4 bits and a palette for each group of channels;
the palettes of iOS 16 are one to a tensor."""


def needed_ios(recipe: Recipe, options: LowerOptions) -> int:
    """Return the iOS version that a package is built for."""
    needed = [_FIRST_IOS.get(precision.name, 0) for precision in recipe.precisions]
    return max(options.minimum_ios, *needed)


def name_systems(ios: int) -> str:
    """Return the systems that came with an iOS version; macOS is three behind since iOS 14."""
    return f"iOS {ios}, macOS {ios - 3}"
