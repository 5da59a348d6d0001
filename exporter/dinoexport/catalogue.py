"""The names that the command line knows, with a line on each."""

from dinoexport.embedded import EMBEDDED
from dinoexport.targets.table import TABLE as TARGETS
from dinoexport.targets.table import get_target
from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.convnets.published import REPOSITORIES
from dinotrain.backbones.vit import VARIANTS
from dinotrain.tasks import TABLE as TASKS
from dinotrain.tasks import get_task


def catalogue() -> dict[str, dict[str, str]]:
    """Tasks, backbones, targets and embedded checkpoints by name."""
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
        "embedded checkpoints": dict(EMBEDDED),
    }
