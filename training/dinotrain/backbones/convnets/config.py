"""What fixes the shape of a convolutional backbone: one small record, stages worked out from it.

``seresnet.py`` and ``efficientnet.py`` build from it; a checkpoint's header holds it as JSON.
Source: METHODS G; compound scaling as in arXiv 1905.11946.
"""

import math
from typing import Literal, NamedTuple

import msgspec

from dinotrain.errors import UsageError

Family = Literal["seresnet", "efficientnet"]

Padding = Literal["symmetric", "same"]
"""``symmetric``: half the kernel on each side. ``same``: TensorFlow's rule, by which a strided
convolution over an even side pads one more behind than before."""

TAP_STRIDES = (4, 8, 16, 32)

MAX_MULTIPLIER = 8.0
"""Beyond every published scale; a header from outside cannot ask for a model without end."""

_CHANNEL_DIVISOR = 8


class Stage(NamedTuple):
    """Blocks of one width; only the first has a stride other than 1.

    ``expansion`` is what a block's output (SE-ResNet) or its inside (EfficientNet) is wider than
    its inside or its input.
    """

    channels: int
    blocks: int
    stride: int
    kernel: int
    expansion: int


_BASE_STAGES: dict[Family, tuple[Stage, ...]] = {
    "seresnet": (
        Stage(256, 3, 1, 3, 4),
        Stage(512, 4, 2, 3, 4),
        Stage(1024, 6, 2, 3, 4),
        Stage(2048, 3, 2, 3, 4),
    ),
    "efficientnet": (
        Stage(16, 1, 1, 3, 1),
        Stage(24, 2, 2, 3, 6),
        Stage(40, 2, 2, 5, 6),
        Stage(80, 3, 2, 3, 6),
        Stage(112, 3, 1, 5, 6),
        Stage(192, 4, 2, 5, 6),
        Stage(320, 1, 1, 3, 6),
    ),
}
_BASE_STEM: dict[Family, int] = {"seresnet": 64, "efficientnet": 32}
_STEM_STRIDE: dict[Family, int] = {"seresnet": 4, "efficientnet": 2}
_EFFICIENTNET_HEAD = 1280


class ConvNetConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    tag_field="kind",
    tag="convnet",
):
    """The architecture of one convolutional backbone.

    ``width`` and ``depth`` multiply the channels and the blocks of the family's smallest member
    (SE-ResNet-50, EfficientNet-B0). ``native_size`` is the side in pixels that it was designed
    for; other sizes are accepted. ``norm_eps`` is BatchNorm's.
    """

    name: str
    family: Family
    width: float = 1.0
    depth: float = 1.0
    padding: Padding = "symmetric"
    norm_eps: float = 1e-5
    native_size: int = 224

    def __post_init__(self) -> None:
        """Refuse multipliers and an epsilon that no model has."""
        for field in ("width", "depth"):
            value = getattr(self, field)
            if not 0 < value <= MAX_MULTIPLIER:
                raise UsageError(
                    f"{self.name}: {field} multiplier {value} is not accepted; above 0 and at most "
                    f"{MAX_MULTIPLIER:g} is"
                )
        if not 0 < self.norm_eps < 1:
            raise UsageError(f"{self.name}: norm_eps {self.norm_eps} is not between 0 and 1")
        if self.family == "seresnet" and self.padding != "symmetric":
            raise UsageError(f"{self.name}: SE-ResNet pads symmetrically, not '{self.padding}'")

    def _channels(self, base: int) -> int:
        """Scale to the nearest multiple of 8, not below 90 % of the exact product."""
        wanted = base * self.width
        rounded = int(wanted + _CHANNEL_DIVISOR / 2) // _CHANNEL_DIVISOR * _CHANNEL_DIVISOR
        rounded = max(rounded, _CHANNEL_DIVISOR)
        return rounded if rounded >= 0.9 * wanted else rounded + _CHANNEL_DIVISOR

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The scaled stages, in order."""
        return tuple(
            stage._replace(
                channels=stage.expansion * self._channels(stage.channels // stage.expansion)
                if self.family == "seresnet"
                else self._channels(stage.channels),
                blocks=math.ceil(stage.blocks * self.depth),
            )
            for stage in _BASE_STAGES[self.family]
        )

    @property
    def stem_channels(self) -> int:
        """Channels of the map that enters the first stage."""
        return self._channels(_BASE_STEM[self.family])

    @property
    def pooled_width(self) -> int:
        """Width of the pooled output."""
        if self.family == "seresnet":
            return self.stages[-1].channels
        return self._channels(_EFFICIENTNET_HEAD)

    @property
    def tap_stages(self) -> dict[int, int]:
        """{stride: number of the last stage whose output has it}, of strides 4, 8, 16, 32."""
        stride = _STEM_STRIDE[self.family]
        found = {}
        for index, stage in enumerate(self.stages):
            stride *= stage.stride
            found[stride] = index
        return {stride: found[stride] for stride in TAP_STRIDES}

    @property
    def tap_channels(self) -> dict[int, int]:
        """{stride: channels of its tap}."""
        return {stride: self.stages[index].channels for stride, index in self.tap_stages.items()}

    @property
    def position_rule(self) -> str:
        """Nothing: there are no positions."""
        return ""

    @property
    def size_step(self) -> int:
        """Pixels that both sides of an image are a multiple of: any size is accepted."""
        return 1

    @property
    def least_size(self) -> int:
        """Pixels of an image's side at least: the largest stride."""
        return TAP_STRIDES[-1]

    @property
    def last_tap(self) -> int:
        """The deepest tap: stride 32."""
        return TAP_STRIDES[-1]

    def stage_count(self, tap: int | None) -> int:
        """Stages that run for a deepest tap; all of them for None, the pooled output."""
        return len(self.stages) if tap is None else self.tap_stages[tap] + 1

    def default_taps(self, count: int) -> tuple[int, ...]:
        """Return the strides that are read where none are named, fine to coarse.

        Of three the finest stays and the coarsest goes: a mask needs edges more than context.
        """
        if not 1 <= count <= len(TAP_STRIDES):
            raise UsageError(f"{count} taps of {self.name}; it has {len(TAP_STRIDES)}")
        return TAP_STRIDES[:count]

    def tap_width(self, tap: int) -> int:
        """Channels of a tap's map, or UsageError for a stride that has none."""
        if tap not in TAP_STRIDES:
            raise UsageError(
                f"{self.name} has no tap at stride {tap}. "
                f"Known: {', '.join(map(str, TAP_STRIDES))}."
            )
        return self.tap_channels[tap]

    def tap_grid(self, tap: int, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a tap's map: ⌈side / stride⌉."""
        return -(-image_size[0] // tap), -(-image_size[1] // tap)


_SCALES = (
    (1.0, 1.0, 224),
    (1.0, 1.1, 240),
    (1.1, 1.2, 260),
    (1.2, 1.4, 300),
    (1.4, 1.8, 380),
    (1.6, 2.2, 456),
    (1.8, 2.6, 528),
    (2.0, 3.1, 600),
)


def _efficientnet(number: int, tensorflow: bool) -> ConvNetConfig:
    width, depth, size = _SCALES[number]
    return ConvNetConfig(
        name=f"{'tf_' if tensorflow else ''}efficientnet_b{number}",
        family="efficientnet",
        width=width,
        depth=depth,
        padding="same" if tensorflow else "symmetric",
        norm_eps=1e-3 if tensorflow else 1e-5,
        native_size=size,
    )


CONVNETS: dict[str, ConvNetConfig] = {
    config.name: config
    for config in (
        ConvNetConfig(name="seresnet50", family="seresnet"),
        *(_efficientnet(number, False) for number in range(len(_SCALES))),
        *(_efficientnet(number, True) for number in range(len(_SCALES))),
    )
}
"""The architectures by name. ``tf_`` ones differ from their namesakes in padding and epsilon."""
