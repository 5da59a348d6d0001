"""What is timed: each candidate's name, runtime, and which table row it belongs to."""

from typing import Literal

import msgspec

Runtime = Literal["onnxruntime", "litert", "openvino"]
Pixels = Literal["uint8", "normalised"]
"""``uint8``: (1, S, S, 3), 0..255. ``normalised``: (1, 3, S, S) float32, mean and std applied."""


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One artifact that answers images."""

    name: str
    family: Literal["ours", "peer", "roofline"]
    runtime: Runtime
    pixels: Pixels
    file: str
    """Name in the folder of one size."""
    what: str
    """How it was made, for the table."""
    exact: bool = False
    """Float32 throughout: must give the reference's probabilities."""
    target: str = ""
    """Of ours, as ``dinoexport build`` takes it; so are the two below."""
    precision: str = ""
    layout: str = ""


CLASSIFY_INPUT = "image"
OUR_PRECISIONS = ("fp32", "w8a8", "w8a8-dynamic")
OUR_TARGETS: dict[str, Runtime] = {"onnx": "onnxruntime", "tflite": "litert"}


def _roofline(name: str, what: str) -> Candidate:
    return Candidate(
        name=name,
        family="roofline",
        runtime="onnxruntime",
        pixels="normalised",
        file=f"{name}.onnx",
        what=what,
    )


ROOFLINE = _roofline("gemm", "the model's matrix products alone, float32")
INTEGER_ROOFLINE = _roofline("gemm-int8", "linear layers' products in int8, attention's in float32")


def our_candidate(target: str, precision: str, layout: str = "tokens") -> Candidate:
    """``dinoexport build`` of one target, precision and layout."""
    name = f"ours-{target}-{precision}" + ("" if layout == "tokens" else f"-{layout}")
    option = "" if layout == "tokens" else f" --layout {layout}"
    return Candidate(
        name=name,
        family="ours",
        runtime=OUR_TARGETS[target],
        pixels="uint8",
        file=f"{name}.{target}",
        what=f"dinoexport build --target {target} --precision {precision}{option}",
        exact=precision == "fp32",
        target=target,
        precision=precision,
        layout=layout,
    )


def _peer(name: str, runtime: Runtime, file: str, what: str, exact: bool = True) -> Candidate:
    return Candidate(
        name=name,
        family="peer",
        runtime=runtime,
        pixels="normalised" if runtime != "openvino" else "uint8",
        file=file,
        what=what,
        exact=exact,
    )


PEER_ONNX = (
    _peer("hf-dynamo", "onnxruntime", "hf-dynamo.onnx", "torch.onnx.export, dynamo"),
    _peer("hf-dynamo-slim", "onnxruntime", "hf-dynamo-slim.onnx", "… and onnxslim"),
    _peer("hf-torchscript", "onnxruntime", "hf-torchscript.onnx", "torch.onnx.export, TorchScript"),
    _peer("hf-torchscript-slim", "onnxruntime", "hf-torchscript-slim.onnx", "… and onnxslim"),
)
PEER_TFLITE = _peer("hf-litert", "litert", "hf-litert.tflite", "litert_torch.convert")
OPENVINO_FP32 = _peer("openvino-fp32", "openvino", "openvino-fp32.xml", "OpenVINO on our ONNX fp32")
OPENVINO_INT8 = _peer(
    "openvino-int8", "openvino", "openvino-int8.xml", "nncf.quantize on our ONNX fp32", exact=False
)
PEERS = (*PEER_ONNX, PEER_TFLITE, OPENVINO_FP32, OPENVINO_INT8)


def all_candidates(precisions: tuple[str, ...]) -> tuple[Candidate, ...]:
    """Every candidate, in the order of the table; ours first."""
    ours = tuple(our_candidate(t, p) for t in OUR_TARGETS for p in precisions)
    # Int8 recipes take that attention by themselves where it pays.
    ours += (our_candidate("onnx", "fp32", "cpu"),) if "fp32" in precisions else ()
    return (*ours, *PEERS, ROOFLINE, INTEGER_ROOFLINE)
