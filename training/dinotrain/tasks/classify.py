"""Image classification: one photograph, exclusive classes, a probability for each.

Source: METHODS D.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from dinotrain.errors import DataError
from dinotrain.tasks.base import Budgets, Case, OutputSpec, Task, TaskInput
from dinotrain.tasks.classify_presets import PRESETS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from dinotrain.data.dataset import Dataset
    from dinotrain.data.images import Pixels
    from dinotrain.decoders import ProbabilityDecoder
    from dinotrain.heads.branch import BranchHead
    from dinotrain.heads.pool import Pool
    from dinotrain.heads.query import QueryHead
    from dinotrain.model import ModelConfig, TaskModel
    from dinotrain.objectives.base import Predictions
    from dinotrain.objectives.classes import ClassObjective
    from dinotrain.report.page import Section
    from dinotrain.tasks.base import Loaded
    from dinotrain.train_config import TrainConfig

SAMPLE_SEED = 20260202
FLIP = 0.5
SPREAD = "probabilities_std"


@final
class ClassifyTask(Task):
    """Which class a photograph shows; the classes come from the data."""

    name = "classify"
    summary = "probabilities of the classes that the training data name, from one photograph"
    inputs = (TaskInput("image", "the photograph"),)
    labels = ("class",)
    presets = PRESETS
    heads = ("mlp", "linear", "probe", "ensemble", "query")
    drop_option = "max-top1-drop"
    drop_unit = "share of pictures"
    budgets = Budgets(
        deploy=0.0001,
        float32=0.0001,
        float16=0.02,
        weights8=0.05,
        dynamic8=0.1,
        static8=0.1,
        weights6=0.1,
        weights4=0.3,
    )
    error_unit = "probability"

    def outputs(self, config: "ModelConfig") -> tuple[OutputSpec, ...]:
        """Return the probabilities, and of an ensemble how far its members disagree."""
        texts = {"probabilities": f"probability of each class: {', '.join(config.classes)}"}
        if config.head.count > 1:
            texts[SPREAD] = "standard deviation between ensemble members of probabilities"
        shape = (1, len(config.classes))
        return tuple(
            OutputSpec(name=n, unit="probability", shape=shape, dtype="float32", description=text)
            for n, text in texts.items()
        )

    def preprocessing(self, image_size: tuple[int, int], window_mm: float) -> str:
        """Crop to the aspect, resize."""
        height, width = image_size
        return (
            f"cut the largest centred part of aspect {width}:{height}, resize to {width}×{height} "
            "pixels (bicubic, antialiased), 8-bit RGB; greyscale is repeated in "
            "all three channels"
        )

    def build_head(self, config: "ModelConfig", pool: "Pool") -> "BranchHead | QueryHead":
        """One logit per class."""
        from dinotrain.heads.branch import BranchSpec
        from dinotrain.heads.build import build_target_head

        if len(config.classes) < 2:
            raise DataError(f"{len(config.classes)} classes; a classifier has two or more")
        return build_target_head(
            config.head,
            inputs=[i.name for i in self.inputs],
            in_width=pool.width,
            branches=[BranchSpec("classes", pool.width, 1)],
            width=len(config.classes),
            join=take_image,
        )

    def build_decoder(self, config: "ModelConfig") -> "ProbabilityDecoder":
        """Softmax."""
        from dinotrain.decoders import ProbabilityDecoder

        return ProbabilityDecoder()

    def choose_loss(self, config: "TrainConfig") -> str:
        """Cross-entropy."""
        from dinotrain.objectives.classes import choose_loss

        return choose_loss(config)

    def objective(self, config: "TrainConfig", model: "TaskModel") -> "ClassObjective":
        """Cross-entropy of the classes."""
        from dinotrain.objectives.classes import ClassObjective

        return ClassObjective(cast("BranchHead", model.head), model.config.classes)

    def read(
        self,
        path: Path,
        *,
        image_size: tuple[int, int],
        seed: int = 0,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Dataset":
        """Read a folder per class (METHODS D)."""
        from dinotrain.data.class_folder import read_class_folder

        return read_class_folder(
            path,
            image_size=image_size,
            seed=seed,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )

    def augment(
        self, pixels: "dict[str, Pixels]", truth: "np.ndarray", stream: "np.random.Generator"
    ) -> "Loaded":
        """Cut a random part out and mirror every other picture (METHODS D)."""
        from dinotrain.data.augment import random_crop

        image = random_crop(pixels["image"], stream)
        if stream.random() < FLIP:
            image = image[:, ::-1]
        return {"image": image}, truth

    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Render eyes into a folder per gaze."""
        from dinotrain.data.synthetic.gazes import write_dataset

        return write_dataset(count, seed, out, progress)

    def drop(
        self,
        expected: "Predictions",
        actual: "Predictions",
        true: "np.ndarray | None" = None,
    ) -> float:
        """Accuracy lost; without labels the share of pictures whose likeliest class changes."""
        wanted, found = (p["probabilities"].argmax(axis=1) for p in (expected, actual))
        if true is None:
            return float((wanted != found).mean())
        right = [int((named == true[:, 0]).sum()) for named in (wanted, found)]
        # Of whole numbers, so that 2 of 200 pictures are 0.01 to the last bit.
        return max(0, right[0] - right[1]) / len(true)

    def render_samples(
        self, count: int, image_size: tuple[int, int], seed: int | None = None
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered eyes."""
        from dinotrain.data.images import fit_image
        from dinotrain.data.synthetic.eyes import MIN_SIDE_PX
        from dinotrain.data.synthetic.gazes import render_gaze

        chosen = SAMPLE_SEED if seed is None else seed
        side = max(MIN_SIDE_PX, *image_size)
        images = (render_gaze(chosen, index, side)[0] for index in range(count))
        return [{"image": fit_image(image, image_size)} for image in images]

    def expected(self, values: dict[str, float]) -> dict[str, float]:
        """Return nothing: no output is one number."""
        return {}

    def evaluate(
        self,
        predicted: "Predictions",
        true: "np.ndarray",
        reference: "np.ndarray",
        classes: tuple[str, ...] = (),
        subjects: Sequence[Hashable] = (),
    ) -> Any:
        """Accuracy and its kin, with the row of the majority class."""
        import numpy as np

        from dinotrain.metrics.classification import evaluate_classes

        seen = reference[np.isfinite(reference)].astype(int)
        majority = int(np.bincount(seen).argmax()) if seen.size else 0
        return {
            "probabilities": evaluate_classes(
                predicted["probabilities"], true[:, 0], majority, classes
            )
        }

    def section(self, case: Case) -> "Section":
        """Accuracies, confusions, the surest mistakes."""
        from dinotrain.report.class_section import class_section

        return class_section(
            case.predicted["probabilities"],
            case.true[:, 0],
            case.config.classes,
            case.names,
            case.load,
            case.metrics["probabilities"],
        )

    def draw(
        self,
        images: "dict[str, np.ndarray]",
        outputs: dict[str, Any],
        caption: str,
        classes: tuple[str, ...] = (),
    ) -> "Image":
        """Draw the photograph beside bars of the most probable classes."""
        from dinotrain.tasks.classify_drawing import draw_classes

        return draw_classes(images["image"], outputs, caption, classes)


def take_image(features: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The head reads the features of the one photograph."""
    return {"classes": features["image"]}
