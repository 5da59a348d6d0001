"""Packages are checked before they are read, and equal conversions give equal bytes."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from coremltools.proto import Model_pb2  # noqa: E402
from torch import nn  # noqa: E402

from dinoexport.errors import BundleError  # noqa: E402
from dinoexport.targets.coreml.evaluator import PackageEvaluator  # noqa: E402
from dinoexport.targets.coreml.package import (  # noqa: E402
    CONVERSION_DATE,
    normalise_package,
    open_package,
)

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def save(path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 9)).eval()
    program = torch.export.export(model, (torch.rand(1, 3, 8, 8),)).run_decompositions({})
    converted = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        inputs=[ct.ImageType(name="image", shape=(1, 3, 8, 8))],
        skip_model_load=True,
    )
    converted.short_description = "tiny"
    converted.save(str(path))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "tiny.mlpackage")


def contents(path: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    assert set(files) >= {MODEL, WEIGHTS, "Manifest.json"}
    return files


def test_two_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.mlpackage"), save(tmp_path / "b.mlpackage")
    model = Model_pb2.Model()
    model.ParseFromString((second / MODEL).read_bytes())
    # As if converted on another day.
    model.description.metadata.userDefined[CONVERSION_DATE] = "1999-12-31"
    (second / MODEL).write_bytes(model.SerializeToString())
    assert contents(first) != contents(second)
    normalise_package(first)
    normalise_package(second)
    assert contents(first) == contents(second)
    assert set(contents(first)) == {MODEL, WEIGHTS, "Manifest.json"}


def test_normalising_changes_nothing_that_is_read(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "n.mlpackage"
    shutil.copytree(saved, path)
    before, operations = open_package(path).spec, PackageEvaluator(path).operations
    normalise_package(path)
    after = open_package(path).spec
    assert PackageEvaluator(path).operations == operations
    assert before.description.metadata.userDefined.pop(CONVERSION_DATE)
    assert after == before
    # coremltools still accepts its own package.
    assert ct.utils.load_spec(str(path)) == after
    once = contents(path)
    normalise_package(path)
    assert contents(path) == once


def cut_weights(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) - 20])


def cut_weights_to_a_stub(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:70])


def shift_weights(path: Path) -> None:
    (path / WEIGHTS).write_bytes(b"\0" * 16 + (path / WEIGHTS).read_bytes())


def drop_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def link_weights_outside(path: Path) -> None:
    outside = path.parent / "outside.bin"
    (path / WEIGHTS).rename(outside)
    (path / WEIGHTS).symlink_to(outside)


def spoil_model(path: Path) -> None:
    (path / MODEL).write_bytes(b"\x0f\xff not a protobuf")


def cut_model(path: Path) -> None:
    data = (path / MODEL).read_bytes()
    (path / MODEL).write_bytes(data[: len(data) // 2])


def drop_model(path: Path) -> None:
    (path / MODEL).unlink()


def drop_manifest(path: Path) -> None:
    (path / "Manifest.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "Manifest.json").write_text("{}")


def spoil_manifest(path: Path) -> None:
    (path / "Manifest.json").write_bytes(b"\xff{")


def manifest_outside(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes((path / MODEL).read_bytes())
    manifest = json.loads((path / "Manifest.json").read_text())
    root = manifest["rootModelIdentifier"]
    manifest["itemInfoEntries"][root]["path"] = "../../elsewhere"
    (path / "Manifest.json").write_text(json.dumps(manifest))


def other_model_type(path: Path) -> None:
    spec = Model_pb2.Model(specificationVersion=1)
    spec.neuralNetwork.SetInParent()
    (path / MODEL).write_bytes(spec.SerializeToString())


def declare_more(path: Path) -> None:
    """The model asks for more than the weight record holds."""
    spec = Model_pb2.Model()
    spec.ParseFromString((path / MODEL).read_bytes())
    function = spec.mlProgram.functions["main"]
    for operation in function.block_specializations[function.opset].operations:
        value = operation.attributes["val"] if operation.type == "const" else None
        if value is not None and value.WhichOneof("value") == "blobFileValue":
            value.type.tensorType.dimensions[0].constant.size += 1
            break
    (path / MODEL).write_bytes(spec.SerializeToString())


DAMAGE: dict[Callable[[Path], None], str] = {
    cut_weights: "ends inside the weight",
    cut_weights_to_a_stub: "ends before the weight",
    shift_weights: "has no weight record",
    drop_weights: "is missing",
    link_weights_outside: "is missing",
    spoil_model: "is not a Core ML model",
    cut_model: "is not a Core ML model",
    drop_model: "named by Manifest.json and missing",
    drop_manifest: "no Manifest.json",
    empty_manifest: "names no root model",
    spoil_manifest: "names no root model",
    manifest_outside: "leads outside the package",
    other_model_type: "only ML programs are accepted",
    declare_more: "where the model declares",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_with_the_path_and_the_next_step(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.mlpackage"
    shutil.copytree(saved, path)
    damage(path)
    with pytest.raises(BundleError, match=DAMAGE[damage]) as caught:
        PackageEvaluator(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_file_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "x.mlpackage").write_text("x")
    with pytest.raises(BundleError, match=r"no Manifest\.json"):
        open_package(tmp_path / "x.mlpackage")
