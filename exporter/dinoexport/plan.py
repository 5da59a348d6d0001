"""What a build is asked for, and what that comes to: all that can be refused before anything is
loaded is refused here.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from dinoexport.embedded import embedded_checkpoint
from dinoexport.manifest import BudgetRecord
from dinoexport.passes.sequence import LAYOUTS
from dinoexport.quantize.observers import DEFAULT_OBSERVER, get_observer
from dinoexport.recipes import Recipe, parse_recipe
from dinoexport.targets.base import LowerOptions
from dinoexport.targets.table import TABLE, expand_targets, get_target
from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import CheckpointConfig, read_config
from dinotrain.errors import CheckpointError, UsageError, unknown_name
from dinotrain.tasks import get_task


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on, and how; looked at only where a recipe wants calibration.

    Attributes:
        path: see ``read_calibration_set``; None renders pictures.
        count: of samples; None for those of ``USUAL_PICTURES``.
        seed: of their choice.
        observer: by name.
    """

    path: Path | None = None
    count: int | None = None
    seed: int = 0
    observer: str = DEFAULT_OBSERVER


@dataclass(frozen=True)
class BuildRequest:
    """One ``build`` command."""

    task: str
    target: str
    out: Path
    checkpoint: Path | None = None
    precision: str = "fp16"
    image_size: tuple[int, int] | None = None
    minimum_ios: int = 17
    layout: str = "tokens"
    calibration: CalibrationRequest = CalibrationRequest()
    budget: BudgetRecord | None = None
    """What the recipe was chosen to hold, of one target."""

    @property
    def lower_options(self) -> LowerOptions:
        """What targets are told."""
        return LowerOptions(self.minimum_ios, self.layout)


@dataclass(frozen=True)
class BuildPlan:
    """What a request comes to, checked; what ``--dry-run`` prints."""

    request: BuildRequest
    checkpoint: Path
    config: CheckpointConfig
    recipe: Recipe
    name: str
    targets: tuple[str, ...]
    weight_bytes: int
    """Of the checkpoint, in float32."""

    def bundle_name(self, target: str) -> str:
        """Name of one target's bundle folder."""
        return f"{self.name}-{target}"

    @property
    def stem(self) -> str:
        """Name without the recipe."""
        return "".join(self.name.rsplit(f"-{self.recipe.name}", 1))

    @property
    def notices(self) -> tuple[str, ...]:
        """What the targets have to say of the recipe, a line each."""
        options = self.request.lower_options
        lines = (get_target(name).notice(self.recipe, options) for name in self.targets)
        return tuple(line for line in lines if line)


def plan_build(request: BuildRequest) -> BuildPlan:
    """Check a request against its checkpoint, reading only the header.

    Raises:
        UsageError: an unknown task, target or precision.
        CheckpointError: no such checkpoint, or it was trained for another task or size.
        BuildError: a target's format cannot hold so many weights.
    """
    get_task(request.task)
    targets = expand_targets(request.target)
    recipe = parse_recipe(request.precision)
    get_observer(request.calibration.observer)
    for name in targets:
        get_target(name).check(recipe)
    path = request.checkpoint or embedded_checkpoint(request.task)
    config = read_config(path)
    if config.task != request.task:
        raise CheckpointError(
            f"{path.name} was trained for task {config.task}, not {request.task}. "
            f"Use --task {config.task}."
        )
    config = _resize(config, request.image_size, path)
    weights = _weight_bytes(path)
    for name in targets:
        get_target(name).check_weights(weights)
    size = "x".join(map(str, dict.fromkeys(config.image_size)))
    _check_layout(request.layout, targets, config, path)
    name = f"{config.task}-{_short(config.backbone.name)}-{size}-{recipe.name}"
    name += "" if request.layout == "tokens" else f"-{request.layout}"
    return BuildPlan(request, path, config, recipe, name, tuple(targets), weights)


def _weight_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weights in float32, from its header; 0 where that is corrupt, which
    loading says better.
    """
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        names = file.keys()
        return 4 * sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return 0


def _check_layout(
    layout: str, targets: Sequence[str], config: CheckpointConfig, path: Path
) -> None:
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    lacking = next((name for name in targets if layout not in get_target(name).layouts), None)
    if lacking is not None:
        having = [name for name in TABLE if layout in get_target(name).layouts]
        raise UsageError(
            f"--layout {layout} is not one of {lacking}. Use --target {','.join(having)}, or "
            f"--layout tokens."
        )
    if layout != "tokens" and not isinstance(config.backbone, ViTConfig):
        raise UsageError(
            f"--layout {layout} is one of tokens, and {path.name} has a convolutional backbone, "
            f"{config.backbone.name}, which has none. Use --layout tokens."
        )


def _short(backbone: str) -> str:
    return backbone.removeprefix("dinov2_").replace("/", "_")


def _resize(config: CheckpointConfig, size: tuple[int, int] | None, path: Path) -> CheckpointConfig:
    if size is None or size == config.image_size:
        return config
    asked = f"{path.name} was trained for image size {config.image_size[0]}, and --image-size"
    step, least = config.backbone.size_step, config.backbone.least_size
    bad = next((side for side in size if side < least or side % step), None)
    if bad is not None and step > 1:
        below = max(bad // step, 1) * step
        raise CheckpointError(
            f"{asked} {bad} is not a multiple of the patch size {step}. "
            f"Use {below} or {below + step}."
        )
    if bad is not None:
        raise CheckpointError(f"{asked} {bad} is under {least}. Use {least} or more.")
    if max(size) > 1036:
        raise CheckpointError(
            f"--image-size {max(size)} is over 1036, twice what DINOv2 was trained at. "
            "Use a smaller one."
        )
    return msgspec.structs.replace(config, image_size=size)
