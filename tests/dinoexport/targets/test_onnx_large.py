"""Models above protobuf's 2 GB, with the limit lowered: weights beside the graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from dinoexport.bundle import artifact_size, is_of_artifact, open_bundle, record_files
from dinoexport.errors import BuildError, BundleError
from dinoexport.targets.onnx import large
from dinoexport.targets.onnx.lower import save
from dinoexport.targets.table import get_target

pytestmark = pytest.mark.e2e
ONNX = get_target("onnx")


@pytest.fixture
def file(built: Callable[[str, str], Path]) -> Path:
    return open_bundle(built("onnx", "fp16")).artifact


@pytest.fixture
def parted(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model in two files."""
    monkeypatch.setattr(large, "LIMIT", 1000)
    path = tmp_path / "model.onnx"
    save(onnx.load(file), path, ONNX.read_metadata(file))
    return path


def test_both_files_hold_the_model(file: Path, parted: Path) -> None:
    data = parted.with_name("model.onnx.data")
    assert sorted(parted.parent.iterdir()) == [parted, data]
    assert parted.stat().st_size < data.stat().st_size
    whole, read = onnx.load(file), onnx.load(parted)
    assert [t.name for t in read.graph.initializer] == [t.name for t in whole.graph.initializer]
    for ours, wanted in zip(read.graph.initializer, whole.graph.initializer, strict=True):
        got, expected = (onnx.numpy_helper.to_array(t) for t in (ours, wanted))
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected), wanted.name
    assert [n.SerializeToString() for n in read.graph.node] == [
        n.SerializeToString() for n in whole.graph.node
    ]
    onnx.checker.check_model(str(parted), full_check=True)


@pytest.mark.parametrize("exact", [False, True], ids=["shipped", "exact"])
def test_it_runs_to_the_same_bits(built, file: Path, parted: Path, eyes, exact: bool) -> None:
    taps = open_bundle(built("onnx", "fp16")).manifest.taps
    wanted, found = (ONNX.runtime(p, taps, exact=exact).run(eyes[0]) for p in (file, parted))
    for ours, theirs in ((found.outputs, wanted.outputs), (found.taps, wanted.taps)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_what_reads_the_graph_alone_needs_no_weights(file: Path, parted: Path) -> None:
    parted.with_name("model.onnx.data").unlink()
    for read in (ONNX.read_metadata, ONNX.norm_epsilons, ONNX.gelu_forms, ONNX.count_operations):
        assert read(parted) == read(file)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_lost_weights_are_one_line(parted: Path, how: str) -> None:
    data = parted.with_name("model.onnx.data")
    content = data.read_bytes()
    data.unlink()
    if how == "cut":
        data.write_bytes(content[: len(content) // 2])
    for exact in (False, True):
        with pytest.raises(BundleError) as error:
            ONNX.runtime(parted, exact=exact)
        assert "\n" not in str(error.value)


def test_the_weights_are_part_of_the_artifact(built, parted: Path) -> None:
    files = record_files(parted.parent)
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert all(is_of_artifact(name, "model.onnx") for name in files)
    assert not is_of_artifact("model.onnx.txt", "model.onnx")
    manifest = open_bundle(built("onnx", "fp16")).manifest
    manifest = type(manifest)(
        **{f: getattr(manifest, f) for f in manifest.__struct_fields__ if f not in _CHANGED},
        artifact="model.onnx",
        files=files,
    )
    assert artifact_size(manifest) == sum(p.stat().st_size for p in parted.parent.iterdir())


_CHANGED = ("artifact", "files")


def test_a_weight_of_too_few_bytes_is_refused(file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.raw_data = tensor.raw_data[:-2]
    with pytest.raises(BuildError, match=f"weight {tensor.name} has"):
        save(model, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


def test_a_shape_that_does_not_fit_is_refused_without_the_weights(file: Path) -> None:
    model = onnx.load(file)
    weights = {t.name: t for t in model.graph.initializer if len(t.dims) == 2}
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights)
    weights[product.input[1]].dims[:] = [1, int(np.prod(weights[product.input[1]].dims))]
    with pytest.raises(BuildError, match="the checker refuses the model"):
        large.check(model)
