"""The trained model of a task: backbone → pool → head → decoder.

This is the reference that every artifact is compared with; the exporter builds its deploy graph
from the same parts.
"""

import msgspec
import torch
from torch import Tensor, nn

from dinotrain.backbones.loading import BackboneConfig, build_backbone, check_image_size
from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig, Features, build_pool
from dinotrain.intervals import Intervals
from dinotrain.tasks import get_task

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that fixes the shape of a model; ``image_size`` is (height, width) in pixels."""

    task: str
    backbone: BackboneConfig
    image_size: tuple[int, int]
    features: FeatureConfig = FeatureConfig()
    head: HeadConfig = HeadConfig()
    encoding: Encoding = Encoding()
    classes: tuple[str, ...] = ()
    """Names of the classes, where the task has classes."""
    intervals: Intervals | None = None
    """Constants of the intervals around measured values, where they were calibrated."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class TaskModel(nn.Module):
    """Backbone, pool, head and decoder of one task."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        task = get_task(config.task)
        self.config = config
        self.task = task
        check_image_size(config.backbone, config.image_size)
        self.backbone = build_backbone(config.backbone)
        self.pool = build_pool(config.backbone, config.features, config.image_size)
        self.head = task.build_head(config, self.pool)
        # Learned stand-ins for images that a training sample lacks.
        self.placeholders = nn.ParameterDict(
            {i.name: nn.Parameter(torch.zeros(self.pool.width)) for i in task.inputs if i.optional}
        )
        self.decoder = task.build_decoder(config)
        self.register_buffer(
            "pixel_mean", torch.tensor(config.mean).reshape(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "pixel_std", torch.tensor(config.std).reshape(1, 3, 1, 1), persistent=False
        )

    def set_intervals_(self, intervals: Intervals | None) -> None:
        """Give the outputs intervals, or take them away, in place; all weights stay."""
        self.config = msgspec.structs.replace(self.config, intervals=intervals)
        decoder = self.task.build_decoder(self.config)
        decoder.load_state_dict(self.decoder.state_dict())
        self.decoder = decoder.to(self.pixel_mean.device).train(self.training)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W), 0..255 → float32, ImageNet-normalised."""
        return (pixels.float() / 255 - self.pixel_mean) / self.pixel_std

    def extract(self, pixels: Tensor) -> Features:
        """(B, 3, H, W), 0..255 → what the backbone gives, (B, …) each, cacheable when frozen."""
        return self.pool.extract(self.backbone, self.normalise(pixels))  # type: ignore[arg-type]

    def logits(
        self, features: dict[str, Features], present: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Features per input → logits.

        Args:
            features: {input: (B, …) each} as ``extract`` gives them.
            present: {input: (B,) bool}; False takes the learned placeholder. None: all are there.

        Returns:
            What the task's head gives, such as (B, members, targets, width).
        """
        pooled = {name: self.pool(value) for name, value in features.items()}
        for name, there in (present or {}).items():
            if name in self.placeholders:
                # One placeholder serves a vector, and every token alike.
                there = there.reshape(-1, *[1] * (pooled[name].ndim - 1))
                pooled[name] = torch.where(there, pooled[name], self.placeholders[name])
        return self.head(pooled)

    def decode(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits → named values in their units, float32, the samples first."""
        return self.decoder(logits)

    def forward(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """{input: (B, 3, H, W), 0..255} → {output name: (B, …) in its unit}."""
        return self.decode(self.logits({name: self.extract(x) for name, x in pixels.items()}))
