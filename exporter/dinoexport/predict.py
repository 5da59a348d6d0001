"""Run a bundle's artifact on picture files, as an app would, and draw what it measured."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoexport.bundle import Bundle, check_files, open_bundle
from dinoexport.console import quiet
from dinoexport.targets.ports import check_outputs
from dinoexport.targets.table import get_target
from dinotrain.data.images import crop_window, fit_image, read_image
from dinotrain.errors import DataError, UsageError, unknown_name
from dinotrain.tasks import get_task

MIN_COVER = 0.5
"""Least part of the window that a picture shows; less means a wrong scale."""


@dataclass(frozen=True)
class Prediction:
    """Named values with their units, and what computed them.

    An output of one number is that number; others are nested lists in the output's shape, without
    the first axis.
    """

    outputs: dict[str, Any]
    units: dict[str, str]
    runtime: str
    notice: str
    class_names: tuple[str, ...] = ()


def predict_files(
    bundle_path: Path,
    arguments: Sequence[str],
    *,
    picture: Path | None = None,
    left_eye: str = "R",
    px_per_mm: float | None = None,
) -> Prediction:
    """Predict from picture files.

    Args:
        bundle_path: a bundle; its digests are checked first.
        arguments: ``NAME=FILE`` per input, or ``FILE`` where the task has one input.
        picture: draw the result into this file.
        left_eye: ``L`` mirrors the pictures into the orientation that the model was trained in.
        px_per_mm: scale of the pictures; without it the largest centred part is taken as the
            window.

    Raises:
        UsageError: an input is missing, unknown or named twice.
        DataError: a picture cannot be used.
        BundleError: the bundle is not what was built.
    """
    bundle = open_bundle(bundle_path)
    files = _parse(arguments, [i.name for i in bundle.manifest.inputs])
    if left_eye.upper() not in ("L", "R"):
        raise UsageError(f"--eye '{left_eye}' is not accepted; L or R")
    if left_eye.upper() == "L" and not bundle.manifest.preprocessing.orientation:
        raise UsageError("--eye L: this bundle's pictures have no side. Leave --eye out.")
    if px_per_mm is not None and not 0 < px_per_mm < 1e4:
        raise UsageError(f"--px-per-mm {px_per_mm:g} is not accepted; above 0, below 10000")
    if px_per_mm is not None and not bundle.manifest.preprocessing.window_mm:
        raise UsageError("--px-per-mm: this bundle reads no fixed window. Leave it out.")
    if picture:
        _check_picture(picture)
    check_files(bundle)
    images = {
        name: _load(file, bundle, left_eye.upper() == "L", px_per_mm)
        for name, file in files.items()
    }
    with quiet(Path(os.devnull)):
        runtime = get_target(bundle.manifest.target).runtime(bundle.artifact)
        result = runtime.run(images)
    check_outputs(result.outputs, bundle.manifest.outputs, bundle.artifact)
    order = [o.name for o in bundle.manifest.outputs]
    values = {name: result.outputs[name] for name in order}
    whole = {o.name for o in bundle.manifest.outputs if o.dtype.startswith(("int", "uint"))}
    prediction = Prediction(
        {n: (v.astype(int) if n in whole else v)[0].tolist() for n, v in values.items()},
        {o.name: o.unit for o in bundle.manifest.outputs},
        runtime.name,
        bundle.manifest.notice,
        bundle.manifest.class_names,
    )
    if picture:
        caption = " · ".join(filter(None, (bundle.manifest.name, bundle.manifest.notice)))
        task, classes = get_task(bundle.manifest.task), bundle.manifest.class_names
        drawn = task.draw(images, values, caption, classes)
        _save(drawn, picture)
    return prediction


def _parse(arguments: Sequence[str], names: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=")
        if not separator:
            if len(names) != 1:
                raise UsageError(
                    f"'{argument}' does not say which input it is; give "
                    + " ".join(f"{n}=FILE" for n in names)
                )
            name, file = names[0], argument
        if not file:
            raise UsageError(f"input {name} names no file: '{argument}'; give {name}=FILE")
        if name not in names:
            raise unknown_name("input", name, names)
        if name in files:
            raise UsageError(f"input {name} is given twice: {files[name]} and {file}")
        files[name] = Path(file)
    missing = [name for name in names if name not in files]
    if missing:
        raise UsageError(
            f"input {missing[0]} is missing; give " + " ".join(f"{n}=FILE" for n in names)
        )
    return {name: files[name] for name in names}


def _load(file: Path, bundle: Bundle, mirror: bool, px_per_mm: float | None) -> np.ndarray:
    size = input_size(bundle)
    image = read_image(file)
    if px_per_mm is None:
        fitted = fit_image(image, size)
    else:
        window_mm = bundle.manifest.preprocessing.window_mm
        window_px = px_per_mm * window_mm
        window_high_px = window_px * size[0] / size[1]
        if image.shape[1] < MIN_COVER * window_px or image.shape[0] < MIN_COVER * window_high_px:
            raise DataError(
                f"{file}: at --px-per-mm {px_per_mm:g} its {image.shape[1]}×{image.shape[0]} "
                f"pixels show less than half of the {window_mm:g} mm window. Check the scale."
            )
        fitted = crop_window(image, px_per_mm, window_mm, size)
    return np.ascontiguousarray(fitted[:, ::-1] if mirror else fitted)


def input_size(bundle: Bundle) -> tuple[int, int]:
    """(height, width) of a bundle's images."""
    shape = bundle.manifest.inputs[0].shape
    return (shape[-3], shape[-2])


def _check_picture(picture: Path) -> None:
    """Refuse a name that cannot be drawn to, before the artifact is run for it."""
    if picture.suffix.lower() != ".png":
        raise UsageError(f"{picture}: pictures are drawn as PNG. Use {picture.with_suffix('.png')}")
    if picture.is_dir():
        raise UsageError(f"{picture}: a folder is in the way. Give another --picture.")


def _save(drawn: Image.Image, picture: Path) -> None:
    partial = picture.with_name(f".{picture.name}.part")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(partial, format="PNG")
        partial.replace(picture)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UsageError(
            f"{picture}: cannot be written: {error.strerror or error}. Give another --picture."
        ) from error
