"""A saved .mlpackage as files: found, checked before anything reads it, and made reproducible."""

import json
import re
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from coremltools.proto import MIL_pb2, Model_pb2
from google.protobuf.message import DecodeError

from dinoexport.errors import BundleError

CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"
DEBUG_MAPPING = "executorch_debug_handle_mapping.json"
_BLOB_RECORD = struct.Struct("<IIQQ")
_BLOB_SENTINEL = 0xDEADBEEF
_BLOB_RECORD_SIZE = 64
_REBUILD = "Build it again, or copy it again from where it was built."


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """A checked package: its specification, the two places it lies in, and its manifest."""

    path: Path
    model_file: Path
    weights_dir: Path
    spec: Any
    manifest: dict


def open_package(path: Path) -> Package:
    """Read a package and check that every weight it names lies inside its weight files.

    Args:
        path: a ``.mlpackage`` folder that holds an ML program.

    Raises:
        BundleError: something is missing, corrupt, truncated or points outside the package.
    """
    manifest, model_file = _find_model(path)
    spec: Any = Model_pb2.Model()
    try:
        spec.ParseFromString(model_file.read_bytes())
    except DecodeError as error:
        raise BundleError(
            f"{path}: {model_file.name} is not a Core ML model. {_REBUILD}"
        ) from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(
            f"{path}: holds a '{spec.WhichOneof('Type')}' model, and only ML programs are "
            f"accepted. Convert with minimum_deployment_target iOS 15 or later."
        )
    weights_dir = model_file.parent / "weights"
    _check_blobs(path, spec, weights_dir)
    return Package(
        path=path, model_file=model_file, weights_dir=weights_dir, spec=spec, manifest=manifest
    )


def _find_model(path: Path) -> tuple[dict, Path]:
    """Return the manifest and the model file that it names as the root."""
    manifest_file = path / "Manifest.json"
    if not manifest_file.is_file():
        raise BundleError(f"{path}: no Manifest.json, so this is no .mlpackage folder. {_REBUILD}")
    try:
        manifest = json.loads(manifest_file.read_bytes())
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        inner = PurePosixPath(entry["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: Manifest.json names no root model. {_REBUILD}") from error
    model_file = path / "Data" / inner
    if not model_file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: its model path '{inner}' leads outside the package. {_REBUILD}")
    if not model_file.is_file():
        raise BundleError(f"{path}: '{inner}' is named by Manifest.json and missing. {_REBUILD}")
    return manifest, model_file


def _values(message: Any) -> Iterator[Any]:
    """Every ``Value`` of an ML program that lies in a file, with blocks inside blocks."""
    for operation in message.operations:
        yield from operation.attributes.values()
        for argument in operation.inputs.values():
            yield from (
                bound.value
                for bound in argument.arguments
                if bound.WhichOneof("binding") == "value"
            )
        for block in operation.blocks:
            yield from _values(block)


def _blobs(spec: Any) -> Iterator[Any]:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for value in _values(block):
                if value.WhichOneof("value") == "blobFileValue":
                    yield value


def _stored_bytes(value: Any) -> int:
    """Bytes that a tensor of this type takes in a weight file; small types are packed."""
    tensor = value.type.tensorType
    count = 1
    for dimension in tensor.dimensions:
        count *= dimension.constant.size
    name = MIL_pb2.DataType.Name(tensor.dataType)
    digits = re.search(r"\d+", name)
    return (count * (int(digits.group()) if digits else 8) + 7) // 8


def _check_blobs(path: Path, spec: Any, weights_dir: Path) -> None:
    root = path.resolve()
    for value in _blobs(spec):
        blob = value.blobFileValue
        file = weights_dir / PurePosixPath(blob.fileName).name
        if not file.is_file() or not file.resolve().is_relative_to(root):
            raise BundleError(f"{path}: weight file '{blob.fileName}' is missing. {_REBUILD}")
        size, wanted = file.stat().st_size, _stored_bytes(value)
        problem = _blob_problem(file, size, blob.offset, wanted)
        if problem:
            raise BundleError(f"{path}: {file.name} ({size} bytes) {problem}. {_REBUILD}")


def _blob_problem(file: Path, size: int, offset: int, wanted: int) -> str | None:
    """Say what is wrong with the weight at ``offset``, or None."""
    if offset + _BLOB_RECORD_SIZE > size:
        return f"ends before the weight at byte {offset}"
    with file.open("rb") as stream:
        stream.seek(offset)
        sentinel, _, length, start = _BLOB_RECORD.unpack(stream.read(_BLOB_RECORD.size))
    if sentinel != _BLOB_SENTINEL:
        return f"has no weight record at byte {offset}"
    if length != wanted:
        return f"holds {length} bytes at byte {offset} where the model declares {wanted}"
    if start + length > size:
        return f"ends inside the weight at byte {start}, which takes {length} bytes"
    return None


def normalise_package(path: Path) -> None:
    """Rewrite a package in place so that equal conversions give equal bytes.

    Three things differ between two conversions of one model: the conversion date in the
    metadata, the random identifiers in Manifest.json, and the order in which protobuf writes
    its maps. A debugging file that the manifest does not name is removed.

    Args:
        path: a ``.mlpackage`` folder that was just saved.

    Raises:
        BundleError: it is no whole package (see ``open_package``).
    """
    package = open_package(path)
    package.spec.description.metadata.userDefined.pop(CONVERSION_DATE, None)
    package.model_file.write_bytes(package.spec.SerializeToString(deterministic=True))
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"]))
        for old, entry in package.manifest["itemInfoEntries"].items()
    }
    entries = {names[old]: entry for old, entry in package.manifest["itemInfoEntries"].items()}
    root = names[package.manifest["rootModelIdentifier"]]
    manifest = package.manifest | {"itemInfoEntries": entries, "rootModelIdentifier": root}
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (path / "Manifest.json").write_text(text, encoding="utf-8")
    (path / DEBUG_MAPPING).unlink(missing_ok=True)
