"""The manifest: the same bytes back, nothing unknown in, no path out of the bundle."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dinoexport.errors import BundleError
from dinoexport.manifest import (
    SCHEMA_VERSION,
    Manifest,
    decode_manifest,
    describe_inputs,
    describe_preprocessing,
    encode_manifest,
)
from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import CheckpointConfig
from dinotrain.tasks import get_task


def refusal(raw: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        decode_manifest(raw, "there/manifest.json")
    text = str(caught.value)
    assert text.startswith("there/manifest.json: ")
    assert "\n" not in text
    return text


def edited(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(encode_manifest(manifest))
    change(content)
    return json.dumps(content).encode()


def test_round_trip(manifest: Manifest) -> None:
    raw = encode_manifest(manifest)
    again = decode_manifest(raw, "m")
    assert again == manifest
    assert encode_manifest(again) == raw
    # Another reader of JSON finds the same.
    assert json.loads(raw)["parity"]["structure"]["epsilons"] == [1e-6]
    assert json.loads(raw)["schema_version"] == SCHEMA_VERSION
    assert raw.endswith(b"}\n")


def places(value: Any, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths to all objects inside a JSON value, itself included."""
    inside: list[tuple[str | int, ...]] = [here] if isinstance(value, dict) else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        if isinstance(part, dict | list):
            inside += places(part, (*here, key))
    return inside


def test_unknown_keys_are_refused_at_every_level(manifest: Manifest) -> None:
    whole = json.loads(encode_manifest(manifest))
    found = places(whole)
    free = {("files",), ("taps",), ("tools",), ("parity", "outputs"), ("parity", "taps")}
    free |= {("parity", "reference", "versions")}
    assert free < set(found)
    # The manifest, inputs, outputs, budget, preprocessing, a file, the checkpoint, six of parity.
    assert len(found) - len(free) == 13
    for place in set(found) - free:
        content = json.loads(encode_manifest(manifest))
        inner = content
        for key in place:
            inner = inner[key]
        inner["colour"] = "red"
        error = refusal(json.dumps(content).encode())
        assert "unknown field `colour`" in error, place


def test_a_manifest_of_before_there_were_budgets_is_read(manifest: Manifest) -> None:
    older = decode_manifest(edited(manifest, lambda m: m.pop("budget")), "m")
    assert older == msgspec.structs.replace(manifest, budget=None)


def test_wrong_types_are_refused(manifest: Manifest) -> None:
    for key, value in {"files": [], "artifact": 3, "inputs": {}, "parity": None}.items():
        assert f"$.{key}" in refusal(edited(manifest, lambda m, k=key, v=value: m.update({k: v})))
    # JSON has no NaN: a value that is none is written as null.
    broken = edited(manifest, lambda m: m["parity"]["taps"]["tokens"].update(structure_db=None))
    assert "got `null`" in refusal(broken)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_other_versions(manifest: Manifest, version: object) -> None:
    error = refusal(edited(manifest, lambda m: m.update(schema_version=version)))
    assert error.endswith("Use the dinoexport that built it, or build again.") or version is True


def test_no_version(manifest: Manifest) -> None:
    """Of files that say nothing the version is asked first, not a field that it may not have."""
    error = refusal(edited(manifest, lambda m: m.pop("schema_version")))
    assert "manifest schema None, this version reads 1" in error


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"some text",
        b"\x00\xff",
        b'{"schema_version": 1, "name": "\xff"}',
        b'{"schema_version": 1e999}',
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"schema_version": 1, "name": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' * 200_000,
        b"PK\x03\x04",
    ],
    ids=[
        "empty", "null", "list", "cut", "text", "binary", "bad-utf8", "infinite", "long-number",
        "byte-order-mark", "deep-lists", "deep-objects", "zip",
    ],
)  # fmt: skip
def test_what_is_no_manifest(raw: bytes) -> None:
    assert len(refusal(raw)) < 300


ESCAPES = ("/etc/passwd", "../x", "a/../../x", "..", "a/..", "", ".", "/", "//x", "../\n")


@pytest.mark.parametrize("name", ESCAPES)
def test_paths_that_leave_the_bundle(manifest: Manifest, name: str) -> None:
    record = {"sha256": "0" * 64, "size_bytes": 1}
    for change in (
        lambda m: m.update(artifact=name),
        lambda m: m["files"].update({name: record}),
    ):
        assert f"{name!r} leaves the bundle" in refusal(edited(manifest, change))


@pytest.mark.parametrize("name", ["a..b", "...", "a/.b", "..a/b", "a\\..\\..\\b", "Zürich 1/x"])
def test_paths_that_stay_inside(manifest: Manifest, name: str) -> None:
    """A backslash is a character of a name on the systems that this runs on."""
    raw = edited(manifest, lambda m: m.update(artifact=name))
    assert decode_manifest(raw, "m").artifact == name


def test_inputs_in_the_targets_natural_form() -> None:
    task = get_task("eyelid")
    image, tensor = (describe_inputs(task, (56, 70), flag) for flag in (True, False))
    assert [i.name for i in image] == [i.name for i in tensor] == ["primary", "up", "down"]
    assert {(i.shape, i.dtype, i.layout) for i in image} == {((56, 70, 3), "uint8", "image RGB")}
    assert {(i.shape, i.layout) for i in tensor} == {((1, 56, 70, 3), "NHWC RGB")}
    assert image[1].description == "the eye in extreme up-gaze"


def test_preprocessing_says_width_first() -> None:
    config = CheckpointConfig(
        task="eyelid",
        backbone=ViTConfig(name="t", embed_dim=64, depth=1, heads=1, ffn_dim=64, grid=(4, 4)),
        image_size=(56, 70),
        window_mm=32.5,
    )
    said = describe_preprocessing(config)
    assert said.window_mm == 32.5
    assert "crop the 32.5 mm window" in said.app
    assert "70×56 pixels" in said.app
    assert str(config.mean) in said.model
    assert str(config.std) in said.model
    assert said.orientation == config.orientation


def test_a_manifest_cannot_be_changed(manifest: Manifest) -> None:
    with pytest.raises(AttributeError):
        manifest.name = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(manifest, name="other").name == "other"
