"""The names that the command line knows, with a line on each."""

from dinoexport.embedded import EMBEDDED
from dinoexport.recipes import PRECISIONS, Activations
from dinoexport.targets.table import TABLE as TARGETS
from dinoexport.targets.table import get_target
from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.published import REPOSITORIES
from dinotrain.backbones.vit import VARIANTS
from dinotrain.tasks import TABLE as TASKS
from dinotrain.tasks import get_task


def catalogue() -> dict[str, dict[str, str]]:
    """Tasks, backbones, targets, recipes and embedded checkpoints by name."""
    backbones = {
        name: f"{v.depth} blocks of {v.embed_dim}, {v.registers or 'no'} registers"
        for name, v in VARIANTS.items()
    }
    backbones |= {
        name: f"{c.family}, taps of {', '.join(map(str, c.tap_channels.values()))} channels"
        + ("" if name in REPOSITORIES else ", no published weights")
        for name, c in CONVNETS.items()
    }
    return {
        "tasks": {name: get_task(name).summary for name in TASKS},
        "backbones": {"embedded": "small, trained on synthetic images; ships here"} | backbones,
        "targets": {
            name: f"{get_target(name).suffix}, {', '.join(get_target(name).supports)}"
            for name in TARGETS
        },
        "recipes": {name: _describe_recipe(name) for name in PRECISIONS},
        "embedded checkpoints": dict(EMBEDDED),
    }


def recipe_table() -> dict[str, dict[str, str]]:
    """What each recipe is and costs, and per target where it runs and pays; "-" where it cannot."""
    return {
        name: {"is": _describe_recipe(name)}
        | {target: get_target(target).supports.get(name, "-") for target in TARGETS}
        for name in PRECISIONS
    }


def _describe_recipe(name: str) -> str:
    precision = PRECISIONS[name]
    parts = [f"{precision.bits}-bit {precision.kind.value}"]
    if precision.block:
        parts.append(f"one scale for {precision.block} inputs")
    if precision.activations is not Activations.FLOAT:
        parts.append(f"activations {precision.activations.value}")
    return f"{', '.join(parts)}; {precision.costs}"
