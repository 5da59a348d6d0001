"""What a training run is asked to do; every field is a choice that a user can make."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.heads.pool import FeatureConfig
from dinotrain.losses.regression import FOCAL_BETA

LossName = Literal["bce", "focal", "mse", "focal_r", "nll", "cross_entropy"]


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
    features: FeatureConfig = FeatureConfig()
    """A pyramid without taps takes the backbone's default ones."""
    head: HeadConfig = HeadConfig()
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
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """step divides the learning rate by 10 after half of the epochs."""
    batch_size: int = 32
    epochs: int = 60
    patience: int = 15
    """Epochs without a better validation error before training stops."""
    input_drop: float = 0.1
    """How often an optional picture is withheld, so that its placeholder learns."""
    seed: int = 0
    weights: Literal["float32", "float16"] = "float32"
    """How the checkpoint stores its weights; metrics are taken with the weights as stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Path | None = None
    """Folder of cached features; the platform's cache folder where None."""
    backbone_note: str = ""
    """What the backbone was trained on, where its file does not say so."""
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if not 0 < self.lr <= 10:
            raise UsageError(f"lr is {self.lr}; above 0 up to 10 is accepted")
        for name in ("batch_size", "epochs", "patience"):
            _above_zero(name, getattr(self, name))
        for name in ("gamma", "focal_r_beta", "or_lambda", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; 0 or more is accepted")
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
        places = ("data", "backbone", "out", "cache", "device", "resume", "backbone_note", "name")
        names = [name for name in self.__struct_fields__ if name not in places]
        return {name: msgspec.to_builtins(getattr(self, name)) for name in names}


def _above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"{name} is {value}; it must be above 0")
