"""What a training run is asked to do; every field is a choice that a user can make."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.feature_cache import Precision
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.losses.regression import FOCAL_BETA

LossName = Literal["bce", "focal", "mse", "focal_r", "nll", "cross_entropy", "dice_focal"]

_COUNTS = (
    "batch_size",
    "epochs",
    "patience",
    "accumulate",
    "augment_copies",
    "restart_mult",
    "devices",
)
_AMOUNTS = (
    "gamma",
    "focal_r_beta",
    "or_lambda",
    "weight_decay",
    "seed",
    "min_lr",
    "min_delta",
    "restart_epochs",
    "warmup_epochs",
    "clip_norm",
)
_PLACES = (
    "data",
    "backbone",
    "out",
    "cache",
    "device",
    "devices",
    "strategy",
    "resume",
    "skip_unreadable",
    "report",
    "events",
    "backbone_note",
    "name",
)
"""What the weights do not depend on, or only through what a run records beside its recipe."""


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training run; ``image_size`` is (height, width) in pixels.

    Source of the defaults: METHODS B5 to B7; the paper's run is ``batch_size=4, epochs=20,
    schedule="constant"``.
    """

    data: Path
    backbone: str
    """A hub name, a weights file, a Hugging Face folder, or a trained checkpoint."""
    out: Path
    """The checkpoint to write; ends in .safetensors."""
    task: str = "eyelid"
    name: str = ""
    image_size: tuple[int, int] = (224, 224)
    features: FeatureConfig | None = None
    """None takes what suits the head and the backbone; no taps take the backbone's own."""
    head: HeadConfig | None = None
    """None takes the task's first."""
    mode: Literal["frozen", "finetune"] = "frozen"
    """Frozen: features are computed once. Fine-tuned: the backbone trains too."""
    encoding: Encoding = Encoding()
    loss: LossName | Literal[""] = ""
    """Nothing takes the task's own."""
    gamma: float = 2.0
    """Counts for ``focal`` and ``focal_r`` only."""
    focal_r_beta: float = FOCAL_BETA
    """How soon ``focal_r`` takes an error for large."""
    bit_rho: float = 1.0
    """Weight of each bit over the one before it; plain and Gray codes only."""
    orthogonality: Literal["task", "so", "grad", "none"] = "task"
    """``task`` keeps the output weights of targets apart, ``so`` makes hidden layers orthogonal;
    ``grad`` is reported and not trained on."""
    or_lambda: float = 0.1
    """Weight of the orthogonality; 0 is off."""
    coverage: float = 0.9
    """How often the intervals around measured values hold; 0 makes none."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd has momentum 0.9."""
    lr: float = 1e-3
    """Of the head."""
    backbone_lr: float = 1e-5
    """Of what comes after the backbone's last block."""
    layer_decay: float = 0.9
    """Factor on the backbone's rate per block on the way back to the input."""
    live_statistics: bool = False
    """Whether BatchNorm follows the batches; its stored statistics are used otherwise."""
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant", "step", "sgdr"] = "cosine"
    """step divides the learning rate by 10 after half of the epochs; sgdr restarts a cosine."""
    min_lr: float = 0.0
    """Where the cosines of the head end; other rates in proportion."""
    restart_epochs: int = 0
    """First period of sgdr; 0 is a third of the epochs."""
    restart_mult: int = 2
    """How much longer each period is than the one before."""
    warmup_epochs: int = 0
    """Epochs in which rates rise in a line from 0."""
    accumulate: int = 1
    """Batches per step of the optimizer."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 is no limit."""
    amp: Literal["off", "bfloat16", "float16"] = "off"
    """Automatic mixed precision."""
    augment: bool = False
    """Whether training pictures change at random, in ways that the task allows."""
    augment_copies: int = 4
    """Of each picture, when features are frozen: as many changes are computed once."""
    batch_size: int = 32
    epochs: int = 60
    patience: int = 15
    """Epochs without a better validation error before training stops."""
    min_delta: float = 0.0
    """By how much a validation error must fall to count as better."""
    input_drop: float = 0.1
    """How often an optional picture is withheld, so that its placeholder learns."""
    seed: int = 0
    weights: Literal["float32", "float16"] = "float32"
    """How the checkpoint stores its weights; metrics are taken with the weights as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    """Processes; a batch is shared among them, so the result does not depend on their number."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    cache: Path | None = None
    """Folder of cached features; the platform's cache folder where None."""
    cache_precision: Precision = "float32"
    """How cached features are stored; float16 takes half of the disk and rounds what is read."""
    backbone_note: str = ""
    """What the backbone was trained on, where its file does not say so."""
    skip_unreadable: bool = False
    """Whether pictures that cannot be read are left out instead of refused."""
    resume: bool = False
    report: bool = False
    """Whether a page about the model is written beside it."""
    events: Path | None = None
    """Folder of TensorBoard logs."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in ("lr", "backbone_lr"):
            if not 0 < getattr(self, name) <= 10:
                raise UsageError(f"{name} is {getattr(self, name)}; above 0 up to 10 is accepted")
        for name in _COUNTS:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in _AMOUNTS:
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; 0 or more is accepted")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay is {self.layer_decay}; above 0 up to 1 is accepted")
        if self.min_lr > self.lr:
            raise UsageError(f"min_lr is {self.min_lr}, above lr {self.lr}")
        if not 0 <= self.input_drop < 1:
            raise UsageError(f"input_drop is {self.input_drop}; 0 up to below 1 is accepted")
        if not 0 <= self.coverage < 1:
            raise UsageError(f"coverage is {self.coverage}; 0 (none) up to below 1 is accepted")
        if not 0 < self.bit_rho <= 1:
            raise UsageError(f"bit_rho is {self.bit_rho}; above 0 up to 1 is accepted")
        if self.out.suffix != ".safetensors":
            raise UsageError(
                f"{self.out}: a checkpoint ends in .safetensors. Use {self.out}.safetensors"
            )

    def recipe(self) -> dict[str, Any]:
        """Return what the weights depend on, as plain values: all but places and devices."""
        names = [name for name in self.__struct_fields__ if name not in _PLACES]
        return {name: msgspec.to_builtins(getattr(self, name)) for name in names}
