"""How each artifact is made: one function each, as a user of that tool would.

All run in processes of their own (``cache``): converters share none with what is timed. Each
returns a note for the table, mostly none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinobench.peers.candidates import CLASSIFY_INPUT, Candidate
from dinobench.peers.roofline import ViTShape, gemm_model, integer_model
from dinobench.peers.weights import make_peer_model, write_checkpoint

CHECKPOINT = "model.safetensors"
IMAGES = "images.npy"
EXPECTED = "expected.npy"
IMAGE_COUNT = 8
SHAPE = ViTShape(width=384, depth=12, heads=6, hidden=1536, patch=14)


class NotMadeError(Exception):
    """A candidate that its tool refuses; the message is the reason."""


def make_common(folder: Path, size: int, hot: bool) -> None:
    """Write the checkpoint, the images, and the probabilities that PyTorch gives for them."""
    import torch

    from dinobench.peers.runners import MEAN, STD
    from dinotrain.tasks import get_task

    model = make_peer_model(size, hot)
    write_checkpoint(model, size, folder / CHECKPOINT)
    samples = get_task("classify").render_samples(IMAGE_COUNT, (size, size))
    images = np.stack([sample[CLASSIFY_INPUT] for sample in samples])
    np.save(folder / IMAGES, images)
    pixels = ((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    with torch.no_grad():
        rows = [model(torch.from_numpy(np.ascontiguousarray(p[np.newaxis]))) for p in pixels]
    np.save(folder / EXPECTED, torch.cat(rows).double().numpy())


def make_ours(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """``dinoexport build`` on the checkpoint; the artifact is taken out of its bundle."""
    import shutil
    import tempfile

    from dinoexport.console import Reporter
    from dinoexport.pipeline import build
    from dinoexport.plan import BuildRequest
    from dinotrain.errors import DinoError

    with tempfile.TemporaryDirectory(prefix="dinobench-", dir=folder) as out:
        request = BuildRequest(
            task="classify",
            target=candidate.target,
            out=Path(out),
            checkpoint=folder / CHECKPOINT,
            precision=candidate.precision,
            layout=candidate.layout,
            image_size=(size, size),
        )
        try:
            (bundle,) = build(request, Reporter(enabled=False)).bundles
        except DinoError as error:
            raise NotMadeError(str(error)) from error
        (artifact,) = bundle.path.glob(f"*.{candidate.target}")
        shutil.copyfile(artifact, folder / candidate.file)
        return "" if bundle.verdict.passed else "its parity verdict is a fail"


def make_dynamo(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """``torch.onnx.export`` of the peer's model by its present exporter."""
    _export_onnx(make_peer_model(size, hot), folder / candidate.file, dynamo=True)
    return ""


def make_torchscript(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """``torch.onnx.export`` of the peer's model by its older exporter."""
    _export_onnx(make_peer_model(size, hot), folder / candidate.file, dynamo=False)
    return ""


def _export_onnx(model: Any, path: Path, *, dynamo: bool) -> None:
    import torch

    # One file: the present exporter would keep weights beside it.
    options: dict[str, Any] = {"external_data": False} if dynamo else {}
    torch.onnx.export(
        model,
        (model.example,),
        str(path),
        dynamo=dynamo,
        input_names=["pixel_values"],
        output_names=["probabilities"],
        **options,
    )


def make_slim(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """onnxslim on the export of the same name."""
    import onnx
    import onnxslim  # pyright: ignore[reportMissingImports]

    source = folder / candidate.file.replace("-slim", "")
    if not source.is_file():
        raise NotMadeError(f"{source.name} was not made")
    slim: Any = onnxslim.slim(str(source))
    onnx.save(slim, str(folder / candidate.file))
    return ""


def make_litert(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """litert-torch on the peer's model."""
    import litert_torch

    model = make_peer_model(size, hot)
    litert_torch.convert(model, (model.example,)).export(str(folder / candidate.file))
    return ""


def make_openvino(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """Read our ONNX fp32 and write OpenVINO's format, float32."""
    source = _our_onnx(folder)
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino.convert_model(str(source))
    openvino.save_model(model, str(folder / candidate.file), compress_to_fp16=False)
    return ""


def make_openvino_int8(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """Quantise our ONNX fp32 by NNCF, told that it is a transformer, on the images that are judged.

    Judging on the images that it was calibrated on favours it.
    """
    source = _our_onnx(folder)
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino.convert_model(str(source))
    images = np.load(folder / IMAGES)
    dataset = nncf.Dataset([image[np.newaxis] for image in images])
    quantised = nncf.quantize(
        model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
    )
    openvino.save_model(quantised, str(folder / candidate.file), compress_to_fp16=False)
    return ""


def _our_onnx(folder: Path) -> Path:
    path = folder / "ours-onnx-fp32.onnx"
    if not path.is_file():
        raise NotMadeError(f"{path.name} was not made")
    return path


def make_roofline(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """Write the model's matrix products as an ONNX file."""
    import onnx

    onnx.save(gemm_model(SHAPE, size), str(folder / candidate.file))
    return ""


def make_integer_roofline(candidate: Candidate, folder: Path, size: int, hot: bool) -> str:
    """Write the same products with integers in them."""
    import onnx

    onnx.save(integer_model(SHAPE, size), str(folder / candidate.file))
    return ""


Maker = Callable[[Candidate, Path, int, bool], str]
MAKERS: dict[str, Maker] = {
    "hf-dynamo": make_dynamo,
    "hf-dynamo-slim": make_slim,
    "hf-torchscript": make_torchscript,
    "hf-torchscript-slim": make_slim,
    "hf-litert": make_litert,
    "openvino-fp32": make_openvino,
    "openvino-int8": make_openvino_int8,
    "gemm": make_roofline,
    "gemm-int8": make_integer_roofline,
}


def maker_of(candidate: Candidate) -> Maker:
    """Return the function that makes a candidate."""
    return make_ours if candidate.family == "ours" else MAKERS[candidate.name]
