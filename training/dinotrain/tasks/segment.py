"""Segmentation of defects: one photograph, a class for every pixel.

Source: METHODS C.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from dinotrain.errors import UsageError
from dinotrain.tasks.base import Budgets, Case, OutputSpec, Task, TaskInput
from dinotrain.tasks.segment_presets import PRESETS

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dinotrain.data.dataset import Dataset, Sample
    from dinotrain.data.images import Pixels
    from dinotrain.decoders import ClassMapDecoder
    from dinotrain.heads.pool import Pool
    from dinotrain.heads.segmentation import SegmentationDecoder
    from dinotrain.model import ModelConfig, TaskModel
    from dinotrain.objectives.base import Predictions
    from dinotrain.objectives.masks import SegmentObjective
    from dinotrain.report.page import Section
    from dinotrain.tasks.base import Loaded
    from dinotrain.train_config import TrainConfig

SAMPLE_SEED = 20260303
OUTPUT = "class_map"
IMAGE_PX = 448
FIELD_MM = 15.0
"""Of the synthetic pictures: near enough that at 224 pixels a scratch of 0.3 mm is 4 pixels wide.
From 25 mm a small frozen backbone saw neither scratches nor dust."""


@final
class SegmentTask(Task):
    """Which class each pixel shows; the classes come from the data, the background first."""

    name = "segment"
    summary = "a map of the classes that the training data name, from one photograph"
    inputs = (TaskInput("image", "the photograph"),)
    labels = ()
    heads = ("multiscale",)
    truth_moves = True
    presets = PRESETS
    # Only pixels at the border of two classes change: a pixel or two by the order of float32 sums,
    # some of each outline by half precision. Both are well below what two people's masks differ by.
    drop_option = "max-miou-drop"
    drop_unit = "mean IoU"
    budgets = Budgets(
        deploy=0.0005,
        float32=0.0005,
        float16=0.01,
        weights8=0.03,
        dynamic8=0.05,
        static8=0.1,
        weights6=0.1,
        weights4=0.2,
    )
    error_unit = "share of pixels"

    def label_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the classes' shares of a mask."""
        from dinotrain.data.dataset import share_names

        return share_names(classes)

    def outputs(self, config: "ModelConfig") -> tuple[OutputSpec, ...]:
        """Return the map; how sure a model is of it is not told."""
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(config.classes))
        return (
            OutputSpec(
                name=OUTPUT,
                unit="class",
                shape=(1, *config.image_size),
                dtype="int32",
                description=f"class of each pixel, rows from the top: {numbered}",
            ),
        )

    def preprocessing(self, image_size: tuple[int, int], window_mm: float) -> str:
        """Crop to the aspect, resize."""
        height, width = image_size
        return (
            f"cut the largest centred part of aspect {width}:{height}, resize to {width}×{height} "
            "pixels (bicubic, antialiased), 8-bit RGB; greyscale is repeated in "
            "all three channels"
        )

    def build_head(self, config: "ModelConfig", pool: "Pool") -> "SegmentationDecoder":
        """One logit per class and pixel."""
        from dinotrain.heads.pool import TapPool
        from dinotrain.heads.segmentation import SegmentationDecoder

        if not isinstance(pool, TapPool) or config.features.kind != "maps":
            raise UsageError(
                f"features '{config.features.kind}' are no maps, which the segmentation decoder "
                "reads. Use maps."
            )
        return SegmentationDecoder(
            pool.widths,
            pool.grids[-1],
            config.image_size,
            len(config.classes),
            config.head.decoder,
        )

    def build_decoder(self, config: "ModelConfig") -> "ClassMapDecoder":
        """The likeliest class."""
        from dinotrain.decoders import ClassMapDecoder

        return ClassMapDecoder()

    def choose_loss(self, config: "TrainConfig") -> str:
        """Dice with focal."""
        from dinotrain.objectives.masks import choose_loss

        return choose_loss(config)

    def objective(self, config: "TrainConfig", model: "TaskModel") -> "SegmentObjective":
        """Dice with focal over the pixels."""
        from dinotrain.objectives.masks import SegmentObjective

        return SegmentObjective(model.config.classes)

    def truth(self, samples: "Sequence[Sample]", image_size: tuple[int, int]) -> "np.ndarray":
        """Return the masks: (n, H, W) uint8, class ids and 255 where there is no label."""
        import numpy as np

        from dinotrain.data.dataset import load_mask
        from dinotrain.data.masks import IGNORE

        masks = np.full((len(samples), *image_size), IGNORE, dtype=np.uint8)
        for place, sample in enumerate(samples):
            if sample.mask:
                masks[place] = load_mask(sample.mask, image_size)
        return masks

    def read(
        self,
        path: Path,
        *,
        image_size: tuple[int, int],
        seed: int = 0,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Dataset":
        """Read a folder of pictures and masks (METHODS C)."""
        from dinotrain.data.mask_folder import read_mask_folder

        return read_mask_folder(
            path,
            image_size=image_size,
            seed=seed,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )

    def augment(
        self, pixels: "dict[str, Pixels]", truth: "np.ndarray", stream: "np.random.Generator"
    ) -> "Loaded":
        """Flip, turn, bend, relight, blur and cover parts (METHODS C), the mask alike."""
        from dinotrain.data.augment import AugmentConfig, augment

        image, mask = augment(pixels["image"], truth, AugmentConfig(), stream)
        return {"image": image}, truth if mask is None else mask

    def error(self, expected: "np.ndarray", actual: "np.ndarray") -> float:
        """Return the share of pixels whose class differs, of the worst sample."""
        return float((expected != actual).reshape(len(expected), -1).mean(axis=1).max())

    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Render metal surfaces with dust, runs of coating and scratches."""
        from dinotrain.data.synthetic.surfaces import write_dataset

        return write_dataset(count, seed, out, progress, size=IMAGE_PX, field_mm=FIELD_MM)

    def drop(
        self,
        expected: "Predictions",
        actual: "Predictions",
        true: "np.ndarray | None" = None,
    ) -> float:
        """Mean IoU lost; without masks 1 − mean IoU of the two class maps."""
        if true is None:
            return 1.0 - _mean_iou(actual[OUTPUT], expected[OUTPUT])
        lost = _mean_iou(expected[OUTPUT], true) - _mean_iou(actual[OUTPUT], true)
        return max(0.0, lost)

    def render_samples(
        self, count: int, image_size: tuple[int, int], seed: int | None = None
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered surfaces."""
        from dinotrain.data.images import fit_image
        from dinotrain.data.synthetic.surfaces import MIN_SIDE_PX, render_surface

        chosen = SAMPLE_SEED if seed is None else seed
        side = max(MIN_SIDE_PX, *image_size)
        surfaces = (
            render_surface(chosen, index, side, field_mm=FIELD_MM) for index in range(count)
        )
        return [{"image": fit_image(surface.image, image_size)} for surface in surfaces]

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
        """Overlap, instances and outlines, with the row of the commonest training class."""
        from dinotrain.metrics.segmentation import SegmentationMeter
        from dinotrain.objectives.masks import majority_class

        meter = SegmentationMeter(classes)
        for guess, mask in zip(predicted[OUTPUT], true, strict=True):
            meter.add(guess, mask)
        return {OUTPUT: meter.result(majority_class(reference))}

    def section(self, case: Case) -> "Section":
        """Overlap, found defects, outlines, worst pictures."""
        from dinotrain.report.mask_section import mask_section

        return mask_section(
            case.predicted[OUTPUT],
            case.true,
            case.config.classes,
            case.names,
            case.load,
            case.metrics[OUTPUT],
        )

    def draw(
        self,
        images: "dict[str, np.ndarray]",
        outputs: dict[str, Any],
        caption: str,
        classes: tuple[str, ...] = (),
    ) -> "Image":
        """Draw the photograph, and beside it the classes in colours with their shares."""
        from dinotrain.tasks.segment_drawing import draw_class_map

        return draw_class_map(images["image"], outputs[OUTPUT], caption, classes)


def _mean_iou(predicted: "np.ndarray", true: "np.ndarray") -> float:
    """Mean IoU over the classes that either of two stacks of masks (n, H, W) has."""
    from dinotrain.data.masks import IGNORE
    from dinotrain.metrics.segmentation import confusion_matrix, overlap

    guess, wanted = (masks.reshape(-1, masks.shape[-1]) for masks in (predicted, true))
    labelled = wanted[wanted != IGNORE]
    classes = int(max(guess.max(), labelled.max(initial=0))) + 1
    shares = [v for v in overlap(confusion_matrix(guess, wanted, classes))[0] if v is not None]
    return sum(shares) / len(shares) if shares else 1.0
