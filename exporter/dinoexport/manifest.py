"""What a bundle says of itself: ``manifest.json``, a versioned schema that refuses unknown keys."""

from pathlib import PurePosixPath
from typing import Any

import msgspec

from dinoexport.errors import BundleError
from dinotrain.checkpoint import CheckpointConfig
from dinotrain.tasks import get_task
from dinotrain.tasks.base import OutputSpec, Task

SCHEMA_VERSION = 1


class _Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class InputSpec(_Frozen, frozen=True, kw_only=True):
    """One image: ``shape`` as an app passes it, 8-bit RGB of exactly that size."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    description: str


class Preprocessing(_Frozen, frozen=True, kw_only=True):
    """What the app does before the model, and what the model does itself."""

    window_mm: float
    orientation: str
    app: str
    model: str


class FileRecord(_Frozen, frozen=True, kw_only=True):
    """Digest and size of one file of the bundle."""

    sha256: str
    size_bytes: int


class CheckpointRecord(_Frozen, frozen=True, kw_only=True):
    """The checkpoint that a bundle was built from."""

    name: str
    sha256: str
    trained_on: str
    position_rule: str


class OutputParity(_Frozen, frozen=True, kw_only=True):
    """One output against the reference, over all samples; ``max_error`` in ``unit``."""

    unit: str
    max_error: float
    budget: float
    sqnr_db: float
    passed: bool


class TapParity(_Frozen, frozen=True, kw_only=True):
    """One tap: SQNR in exact arithmetic with the shipped weights, and as the artifact runs; and
    the least cosine of a sample as it runs.
    """

    structure_db: float
    precision_db: float
    cosine: float


class Structure(_Frozen, frozen=True, kw_only=True):
    """The structural gate: every tap in exact arithmetic, against torch with the same weights."""

    runtime: str
    samples: int | None = None
    """That it was judged on; None where it is not said: all of the reference."""
    threshold_db: float
    worst_tap: str
    worst_db: float
    gelu: tuple[str, ...]
    epsilons: tuple[float, ...] = ()
    passed: bool


class Similarity(_Frozen, frozen=True, kw_only=True):
    """The gate of quantised recipes: every tap as the artifact runs, against float32 PyTorch."""

    threshold: float
    worst_tap: str
    worst_cosine: float
    passed: bool


class Blame(_Frozen, frozen=True, kw_only=True):
    """The first place at which the artifact leaves the reference."""

    gate: str
    layer: str
    sqnr_db: float
    previous_layer: str
    previous_db: float
    message: str


class ReferenceRecord(_Frozen, frozen=True, kw_only=True):
    """Where the reference came from."""

    device: str
    versions: dict[str, str]
    samples: int
    checkpoint_sha256: str


class CalibrationSummary(_Frozen, frozen=True, kw_only=True):
    """Which pictures ranges of activations come from; ``calibration.json`` has the ranges."""

    source: str
    count: int
    seed: int
    sha256: str
    observer: str


class BudgetRecord(_Frozen, frozen=True, kw_only=True):
    """What ``build --precision auto`` was asked to hold, and what the artifact lost on pictures
    that neither calibration nor the proposal of mixtures saw.

    Attributes:
        option: of the command line that set it, such as ``max-error-mm``.
        unit: of ``allowed`` and ``measured``.
        allowed: at most, on the held-out pictures.
        measured: of this artifact, as it is shipped.
        samples: held out.
        source: of these, in a few words.
        pixels_sha256: over their pixels, in order; see ``pictures.set_digest``.
        artifact_sha256: of what was measured; see ``artifact_digest``.
        passed: it held.
    """

    option: str
    unit: str
    allowed: float
    measured: float
    samples: int
    source: str
    pixels_sha256: str
    artifact_sha256: str
    passed: bool


class Verdict(_Frozen, frozen=True, kw_only=True):
    """The result of parity; ``passed`` is true only if every gate passed."""

    passed: bool
    runtime: str
    reference: ReferenceRecord
    outputs: dict[str, OutputParity]
    structure: Structure
    similarity: Similarity | None = None
    taps: dict[str, TapParity]
    blame: Blame | None = None


class Manifest(_Frozen, frozen=True, kw_only=True):
    """Everything that an app or a check needs to know of a bundle."""

    schema_version: int = SCHEMA_VERSION
    name: str
    task: str
    target: str
    precision: str
    layout: str = "tokens"
    calibration: CalibrationSummary | None = None
    budget: BudgetRecord | None = None
    artifact: str
    minimum_os: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    files: dict[str, FileRecord]
    checkpoint: CheckpointRecord
    taps: dict[str, str]
    tools: dict[str, str]
    licence: str
    notice: str
    parity: Verdict


def describe_inputs(task: Task, image_size: tuple[int, int], image_input: bool) -> list[InputSpec]:
    """Input specifications in the target's natural form (Core ML image, or NHWC uint8)."""
    height, width = image_size
    shape = (height, width, 3) if image_input else (1, height, width, 3)
    layout = "image RGB" if image_input else "NHWC RGB"
    return [
        InputSpec(name=i.name, shape=shape, dtype="uint8", layout=layout, description=i.description)
        for i in task.inputs
    ]


def describe_preprocessing(config: CheckpointConfig) -> Preprocessing:
    """Say what the app must do, and what it must not do again."""
    task = get_task(config.task)
    return Preprocessing(
        window_mm=config.window_mm,
        orientation=config.orientation,
        app=task.preprocessing(config.image_size, config.window_mm),
        model=f"scales to 0..1 and normalises with mean {config.mean} and std {config.std}",
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode as indented JSON, the same bytes for the same manifest."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(raw: bytes, where: str) -> Manifest:
    """Decode and check a manifest from outside.

    Raises:
        BundleError: not JSON, an unknown key, a wrong type, another version, a path that leaves
            the bundle.
    """
    try:
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("schema_version")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: not a JSON manifest: {error}. Build it again.") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: manifest schema {version}, this version reads {SCHEMA_VERSION}. "
            "Use the dinoexport that built it, or build again."
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{where}: {error}. Build it again.") from error
    for name in (manifest.artifact, *manifest.files):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise BundleError(f"{where}: file name {name!r} leaves the bundle. Do not use it.")
    return manifest
