"""Eyelid measurement: MRD1 and MRD2 from primary gaze, levator function from up and down gaze.

Source: METHODS B2, B3.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from dinotrain.tasks.base import Branch, TargetSpec, Task, TaskInput

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from dinotrain.data.dataset import Dataset

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
    window_mm = 40.0
    budgets_mm = {"fp32": 0.001, "fp16": 0.02}  # noqa: RUF012

    def combine(self, features: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """MRD reads the primary gaze; LF reads up ‖ down ‖ up − down."""
        up, down = features["up"], features["down"]
        return {"mrd": features["primary"], "lf": torch.cat((up, down, up - down), dim=-1)}

    def read(self, path: Path, *, image_size: tuple[int, int], seed: int = 0) -> "Dataset":
        """Read a manifest CSV (METHODS B3)."""
        from dinotrain.data.eyelid_manifest import read_manifest

        return read_manifest(path, image_size=image_size, window_mm=self.window_mm, seed=seed)

    def synthesise(
        self, count: int, seed: int, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Render ``count`` synthetic eyes into a folder."""
        from dinotrain.data.synthetic.eyes import write_dataset

        return write_dataset(count, seed, out, progress)

    def render_samples(
        self, count: int, image_size: tuple[int, int]
    ) -> "list[dict[str, np.ndarray]]":
        """Rendered eyes of a fixed seed, in right-eye orientation."""
        import numpy as np

        from dinotrain.data.images import crop_window
        from dinotrain.data.synthetic.eyes import MIN_SIDE_PX, render_eye

        side = max(MIN_SIDE_PX, *image_size)
        samples = []
        for index in range(count):
            eye = render_eye(SAMPLE_SEED, index, side, self.window_mm)
            sample = {}
            for gaze, square in eye.images.items():
                # The width of an input is the window, whatever its height.
                image = crop_window(square, side / self.window_mm, self.window_mm, image_size)
                sample[gaze] = np.ascontiguousarray(image[:, ::-1] if eye.eye == "L" else image)
            samples.append(sample)
        return samples

    def evaluate(self, predicted: "np.ndarray", true: "np.ndarray", reference: "np.ndarray") -> Any:
        """Metrics of METHODS B8 per target, with the mean-predictor row."""
        from dinotrain.metrics.regression import evaluate_targets

        return evaluate_targets(predicted, true, reference, self.targets)

    def draw(
        self, images: "dict[str, np.ndarray]", outputs: dict[str, float], caption: str
    ) -> "Image":
        """Draw MRD1 and MRD2 as brackets from the light reflex, LF beside the two gazes."""
        from dinotrain.tasks.eyelid_drawing import draw_measurement

        return draw_measurement(images, outputs, caption, window_mm=self.window_mm)
