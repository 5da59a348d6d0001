"""Eyelid measurement: MRD1 and MRD2 from primary gaze, levator function from up and down gaze.

Source: METHODS B2, B3.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch

from dinotrain.tasks.base import Branch, Budgets, Case, OutputSpec, TargetSpec, Task, TaskInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from dinotrain.data.dataset import Dataset
    from dinotrain.data.images import Pixels
    from dinotrain.decoders import MeasureDecoder
    from dinotrain.heads.branch import BranchHead
    from dinotrain.heads.pool import Pool
    from dinotrain.heads.query import QueryHead
    from dinotrain.intervals import Intervals
    from dinotrain.model import ModelConfig, TaskModel
    from dinotrain.objectives.base import Predictions
    from dinotrain.objectives.measure import MeasureObjective
    from dinotrain.report.page import Section
    from dinotrain.tasks.base import Loaded
    from dinotrain.train_config import TrainConfig

SAMPLE_SEED = 20260101


@final
class EyelidTask(Task):
    """MRD1, MRD2 and levator function (LF) of one eye, in millimetres."""

    name = "eyelid"
    summary = "eyelid distances MRD1, MRD2 and levator function of one eye, in mm"
    inputs = (
        TaskInput("primary", "the eye in primary gaze"),
        TaskInput("up", "the eye in extreme up-gaze", optional=True),
        TaskInput("down", "the eye in extreme down-gaze", optional=True),
    )
    targets = (
        TargetSpec("mrd1", "mm", -6.0, 16.0, "corneal light reflex to upper-lid margin, signed"),
        TargetSpec("mrd2", "mm", 0.0, 16.0, "corneal light reflex to lower-lid margin"),
        TargetSpec("lf", "mm", 0.0, 32.0, "upper-lid excursion from down-gaze to up-gaze"),
    )
    branches = (
        Branch("mrd", ("mrd1", "mrd2"), inputs_read=1),
        Branch("lf", ("lf",), inputs_read=3),
    )
    labels = tuple(target.name for target in targets)
    heads = ("mlp", "linear", "probe", "ensemble", "query")
    window_mm = 40.0
    orientation = "right"
    notice = "Research software, not a medical device."
    drop_option = "max-error-mm"
    drop_unit = "mm"
    budgets = Budgets(
        deploy=0.0001,
        float32=0.001,
        float16=0.02,
        weights8=0.1,
        dynamic8=0.3,
        static8=0.5,
        weights6=0.3,
        weights4=1.0,
    )
    error_unit = "mm"

    def outputs(self, config: "ModelConfig") -> tuple[OutputSpec, ...]:
        """Return the three distances, how sure they are, and their intervals.

        Ensembles and Gaussians have standard deviations, calibrated models have intervals.
        """
        found = [(t.output_name, t.unit, t.description) for t in self.targets]
        spread = _spread(config)
        if spread:
            found += [(t.std_name, t.unit, f"{spread} of {t.output_name}") for t in self.targets]
        if config.intervals is not None:
            found += [
                (t.interval_names[side], t.unit, _interval(end, t, config.intervals, index))
                for side, end in enumerate(("lower", "upper"))
                for index, t in enumerate(self.targets)
            ]
        return tuple(
            OutputSpec(name=name, unit=unit, shape=(1,), dtype="float32", description=text)
            for name, unit, text in found
        )

    def preprocessing(self, image_size: tuple[int, int], window_mm: float) -> str:
        """Crop to scale, mirror, resize."""
        height, width = image_size
        return (
            f"crop the {window_mm:g} mm window, mirror left eyes, resize to "
            f"{width}×{height} pixels (bicubic, antialiased), 8-bit RGB; greyscale is repeated in "
            "all three channels"
        )

    def build_head(self, config: "ModelConfig", pool: "Pool") -> "BranchHead | QueryHead":
        """One branch per set of gazes, or one query per distance."""
        from dinotrain.heads.branch import BranchSpec
        from dinotrain.heads.build import build_target_head

        return build_target_head(
            config.head,
            inputs=[i.name for i in self.inputs],
            in_width=pool.width,
            branches=[
                BranchSpec(b.name, b.inputs_read * pool.width, len(b.targets))
                for b in self.branches
            ],
            width=config.encoding.width,
            join=join_gazes,
        )

    def build_decoder(self, config: "ModelConfig") -> "MeasureDecoder":
        """Codes or z-scores to millimetres, with the intervals of the config."""
        from dinotrain.decoders import MeasureDecoder

        return MeasureDecoder(config.encoding, self.targets, config.intervals)

    def choose_loss(self, config: "TrainConfig") -> str:
        """Cross-entropy of bits; squared error of a scalar; likelihood of a Gaussian."""
        from dinotrain.objectives.measure import choose_loss

        return choose_loss(config)

    def objective(self, config: "TrainConfig", model: "TaskModel") -> "MeasureObjective":
        """Errors of bits or of z-scores."""
        from dinotrain.objectives.measure import MeasureObjective

        return MeasureObjective(
            config, cast("BranchHead", model.head), cast("MeasureDecoder", model.decoder)
        )

    def read(
        self,
        path: Path,
        *,
        image_size: tuple[int, int],
        seed: int = 0,
        skip_unreadable: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Dataset":
        """Read a manifest CSV (METHODS B3)."""
        from dinotrain.data.eyelid_manifest import read_manifest

        return read_manifest(
            path,
            image_size=image_size,
            window_mm=self.window_mm,
            seed=seed,
            skip_unreadable=skip_unreadable,
            progress=progress,
        )

    def augment(
        self, pixels: "dict[str, Pixels]", truth: "np.ndarray", stream: "np.random.Generator"
    ) -> "Loaded":
        """Change light and sharpness alone: a picture's geometry is what is measured."""
        from dinotrain.data.augment import LIGHT, augment

        streams = stream.spawn(len(pixels))
        changed = {
            name: augment(pixels[name], None, LIGHT, own)[0]
            for name, own in zip(sorted(pixels), streams, strict=True)
        }
        return changed, truth

    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Render ``count`` synthetic eyes into a folder."""
        from dinotrain.data.synthetic.eyes import write_dataset

        return write_dataset(count, seed, out, progress)

    def drop(
        self,
        expected: "Predictions",
        actual: "Predictions",
        true: "np.ndarray | None" = None,
    ) -> float:
        """Largest difference of any output from float32's; labels do not come into it."""
        return max(float(abs(actual[name] - value).max()) for name, value in expected.items())

    def render_samples(
        self, count: int, image_size: tuple[int, int], seed: int | None = None
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered eyes, in right-eye orientation."""
        import numpy as np

        from dinotrain.data.images import crop_window
        from dinotrain.data.synthetic.eyes import MIN_SIDE_PX, render_eye

        chosen = SAMPLE_SEED if seed is None else seed
        side = max(MIN_SIDE_PX, *image_size)
        samples = []
        for index in range(count):
            eye = render_eye(chosen, index, side, self.window_mm)
            sample = {}
            for gaze, square in eye.images.items():
                # The width of an input is the window, whatever its height.
                image = crop_window(square, side / self.window_mm, self.window_mm, image_size)
                sample[gaze] = np.ascontiguousarray(image[:, ::-1] if eye.eye == "L" else image)
            samples.append(sample)
        return samples

    def expected(self, values: dict[str, float]) -> dict[str, float]:
        """Return the distances under their outputs' names."""
        return {t.output_name: values[t.name] for t in self.targets if t.name in values}

    def evaluate(
        self,
        predicted: "Predictions",
        true: "np.ndarray",
        reference: "np.ndarray",
        classes: tuple[str, ...] = (),
        subjects: Sequence[Hashable] = (),
    ) -> Any:
        """Metrics of METHODS B8 per target, with the mean-predictor row.

        Args:
            predicted: {output name: (n,)}; standard deviations and intervals are judged where they
                are among them. Only values: (n, 3).
            true: (n, 3), NaN where there is no label.
            reference: (m, 3), labels that were trained on.
            classes: not read.
            subjects: (n,), who each row is of; with them intervals are judged by subject too.
        """
        import numpy as np

        from dinotrain.metrics.regression import evaluate_targets
        from dinotrain.metrics.uncertainty import evaluate_intervals, evaluate_uncertainty

        targets = self.targets
        values = np.stack([predicted[t.output_name] for t in targets], axis=1)
        parts = [evaluate_targets(values, true, reference, targets)]
        if targets[0].std_name in predicted:
            std = np.stack([predicted[t.std_name] for t in targets], axis=1)
            parts.append(evaluate_uncertainty(values, std, true, targets))
        if targets[0].interval_names[0] in predicted:
            low, high = (
                np.stack([predicted[t.interval_names[side]] for t in targets], axis=1)
                for side in (0, 1)
            )
            parts.append(evaluate_intervals(low, high, true, targets, subjects))
        names = [t.output_name for t in targets]
        return {name: {k: v for part in parts for k, v in part[name].items()} for name in names}

    def calibrate(
        self,
        predicted: "Mapping[str, NDArray[np.floating]]",
        true: "NDArray[np.floating]",
        subjects: Sequence[Hashable],
        coverage: float,
    ) -> "tuple[Intervals | None, str]":
        """Split conformal intervals per distance (METHODS B8)."""
        from dinotrain.calibration import calibrate

        return calibrate(predicted, true, subjects, coverage, self.targets)

    def section(self, case: Case) -> "Section":
        """Agreement per distance, uncertainty where it is stated, worst eyes."""
        from dinotrain.report.measure_section import measure_section

        return measure_section(
            case.predicted,
            case.true,
            self.targets,
            case.names,
            case.load,
            case.metrics,
            case.config.intervals.coverage if case.config.intervals else None,
        )

    def draw(
        self,
        images: "dict[str, np.ndarray]",
        outputs: dict[str, Any],
        caption: str,
        classes: tuple[str, ...] = (),
    ) -> "Image":
        """Draw MRD1 and MRD2 as brackets from the light reflex, LF beside the two gazes."""
        import numpy as np

        from dinotrain.tasks.eyelid_drawing import draw_measurement

        values = {name: float(np.ravel(value)[0]) for name, value in outputs.items()}
        return draw_measurement(images, values, caption, window_mm=self.window_mm)


def join_gazes(features: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """MRD reads the primary gaze; LF reads up ‖ down ‖ up − down."""
    up, down = features["up"], features["down"]
    return {"mrd": features["primary"], "lf": torch.cat((up, down, up - down), dim=-1)}


def _spread(config: "ModelConfig") -> str:
    """Say what the model's standard deviation is, or nothing where it has none."""
    ensemble = config.head.count > 1
    if config.encoding.kind == "gaussian":
        return "standard deviation" + (" of the mixture of ensemble members" if ensemble else "")
    return "standard deviation between ensemble members" if ensemble else ""


def _interval(end: str, target: TargetSpec, intervals: "Intervals", index: int) -> str:
    return (
        f"{end} end of the {100 * intervals.coverage:g} % interval of {target.output_name} for a "
        f"new subject; split conformal, calibrated on {intervals.subjects[index]} validation "
        "subjects, by whom the weights were chosen too"
    )
