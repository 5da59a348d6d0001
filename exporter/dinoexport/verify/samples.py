"""The images that parity runs on: photographs that ship with the package, and rendered ones."""

from importlib.resources import files

import numpy as np
from PIL import Image

from dinotrain.tasks.base import Task

RENDERED = 4
_PHOTOGRAPHS = ("astronaut_face", "astronaut_eye_right", "astronaut_eye_left", "cat_face")


def parity_samples(task: Task, image_size: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """Inputs for parity, always the same: {input: (H, W, 3) uint8}.

    Two samples are made of photographs, in two orders; the others are rendered by the task.
    """
    photographs = [_photograph(name, image_size) for name in _PHOTOGRAPHS]
    names = [i.name for i in task.inputs]
    samples = [
        {name: photographs[(start + k) % len(photographs)] for k, name in enumerate(names)}
        for start in (1, 3)
    ]
    return samples + task.render_samples(RENDERED, image_size)


def _photograph(name: str, image_size: tuple[int, int]) -> np.ndarray:
    with (files("dinoexport.verify") / "samples" / f"{name}.png").open("rb") as file:
        image = Image.open(file).convert("RGB")
    height, width = image_size
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
