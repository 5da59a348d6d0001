"""What a study is: groups of variants of one recipe; the runs are these × seeds.

The three here are the eyelid paper's (arXiv 2504.00515), as METHODS B7 reads them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from dinotrain.encoding import Encoding
from dinotrain.errors import UsageError
from dinotrain.heads.branch import HeadConfig
from dinotrain.train_config import TrainConfig

Fields = Mapping[str, Any]
"""{field of ``TrainConfig``: value}."""

RENDER_SEED = 11
"""Of the eyes that are rendered for a study without data."""
NEVER = 10**6
"""A patience that no run exhausts."""


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of variants; the first of each group, or of all, is what others are compared with."""

    name: str
    title: str
    text: str
    """What is varied and why."""
    claim: str
    """What the paper is said to have found."""
    backbone: str
    """That the paper used."""
    shared: Fields
    groups: Mapping[str, Mapping[str, Fields]]
    """{group: {variant: what differs}}."""
    against: Literal["study", "group"]
    """Whether variants are compared with the first of the study or of their group."""
    task: str = "eyelid"


class Variant(NamedTuple):
    """One row of a study's table."""

    group: str
    name: str


class StudyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A study and what it is run on; ``seeds`` counts them, from 0 on."""

    study: Study
    backbone: str
    """As ``TrainConfig`` takes it."""
    out: Path
    """Folder of the study: its checkpoints, results and page."""
    data: Path | None = None
    """None renders ``count`` samples into the folder."""
    count: int = 400
    seeds: int = 5
    epochs: int | None = None
    """Of every run; None leaves the recipes their own."""
    image_size: tuple[int, int] = (224, 224)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Path | None = None
    keep: bool = True
    """Whether checkpoints stay; the results hold all that the tables need."""

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to run."""
        for name in ("count", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All rows of the table, in order."""
        return tuple(
            Variant(group, name) for group, rows in self.study.groups.items() for name in rows
        )

    def reference(self, variant: Variant) -> Variant:
        """Return what a variant is compared with; the reference of a reference is itself."""
        groups = self.study.groups
        group = variant.group if self.study.against == "group" else next(iter(groups))
        return Variant(group, next(iter(groups[group])))

    def config(self, variant: Variant, seed: int, data: Path) -> TrainConfig:
        """Return the recipe of one run.

        Args:
            variant: a row of the table.
            seed: of the run: first weights, order of samples, dropout, withheld pictures, and the
                split where the data leave it blank.
            data: what the task's reader reads.
        """
        study = self.study
        fields = {**study.shared, **study.groups[variant.group][variant.name]}
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        name = f"{study.name}-{_slug(variant.group)}-{_slug(variant.name)}-{seed}"
        return TrainConfig(
            task=study.task,
            data=data,
            backbone=self.backbone,
            out=self.out / "runs" / f"{name}.safetensors",
            name=name,
            image_size=self.image_size,
            seed=seed,
            device=self.device,
            cache=self.cache,
            **fields,
        )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


_MSE = {"encoding": Encoding(kind="scalar"), "loss": "mse"}
_PLAIN_8 = {"encoding": Encoding(kind="plain", bits=8), "loss": "bce"}
_PLAIN_16 = {"encoding": Encoding(kind="plain", bits=16), "loss": "bce"}
_GRAY_8 = {"encoding": Encoding(kind="gray", bits=8), "loss": "bce"}
_GAUSSIAN = {"encoding": Encoding(kind="gaussian"), "loss": "nll"}
_MLP = {"head": HeadConfig(kind="mlp")}
_ENSEMBLE = {"head": HeadConfig(kind="ensemble", members=5)}
_BARE = {"mode": "frozen", "orthogonality": "none"}
# No early stop: the paper names none.
_PAPER = {"batch_size": 4, "epochs": 20, "schedule": "constant", "patience": NEVER}

BASELINE = Study(
    name="baseline",
    title="Baseline: frozen backbone and MLP",
    text="One MLP on frozen features. The paper's recipe (Adam 1e-3, batch 4, 20 epochs) beside "
    "ours (batch 32, up to 60 epochs, cosine, early stop), squared errors beside binary codes.",
    claim="Mean squared errors of a frozen DINOv2 with an MLP, in the table of published figures "
    "below; binary encoding is said to steady training.",
    backbone="ViT-B/14 with registers, DINOv2 weights",
    shared={**_BARE, **_MLP},
    groups={
        "the paper's recipe": {
            "MSE": {**_PAPER, **_MSE},
            "plain code, 8 bits": {**_PAPER, **_PLAIN_8},
        },
        "our recipe": {
            "MSE": _MSE,
            "plain code, 8 bits": _PLAIN_8,
            "plain code, 16 bits": _PLAIN_16,
            "Gray code, 8 bits": _GRAY_8,
        },
    },
    against="study",
)

ENSEMBLE = Study(
    name="ensemble",
    title="Ensemble: one MLP against five",
    text="One MLP against a deep ensemble of five on the same features, each with squared errors, "
    "with a Gaussian per distance, and with bits.",
    claim="An ensemble is said to lower the variance by 10 to 20 %; of what, over what, is not "
    "told. Here two readings stand: the spread of the mean absolute error over seeds, and the "
    "spread of one eye's value over seeds.",
    backbone="ViT-B/14 with registers, DINOv2 weights",
    shared=_BARE,
    groups={
        "MSE": {"MLP": {**_MSE, **_MLP}, "ensemble of 5": {**_MSE, **_ENSEMBLE}},
        "Gaussian": {"MLP": {**_GAUSSIAN, **_MLP}, "ensemble of 5": {**_GAUSSIAN, **_ENSEMBLE}},
        "plain code, 8 bits": {
            "MLP": {**_PLAIN_8, **_MLP},
            "ensemble of 5": {**_PLAIN_8, **_ENSEMBLE},
        },
    },
    against="group",
)

FOCAL = Study(
    name="focal",
    title="Focal loss and orthogonality",
    text="Focal loss on 8 plain bits with γ 0 (cross-entropy), 2, 4 and 6, without and with the "
    "orthogonality of targets (λ 0.1), one MLP on frozen features.",
    claim="γ of 2 to 4 is said to help, focal loss alone to be erratic, and orthogonality to "
    "steady it.",
    backbone="EfficientNet-B0, ImageNet weights",
    shared={**_MLP, **_PLAIN_8, "loss": "focal", "mode": "frozen"},
    groups={
        title: {
            f"γ = {gamma}": {"gamma": float(gamma), "orthogonality": kind, "or_lambda": 0.1}
            for gamma in (0, 2, 4, 6)
        }
        for title, kind in (("without orthogonality", "none"), ("with orthogonality", "task"))
    },
    against="study",
)

STUDIES = {study.name: study for study in (BASELINE, ENSEMBLE, FOCAL)}
