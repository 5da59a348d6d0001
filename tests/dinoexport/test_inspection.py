"""inspect: figures that other tools count too, and what it refuses to describe."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from coremltools.proto import Model_pb2
from safetensors import safe_open

from dinoexport.errors import TamperedError
from dinoexport.inspection import inspect_path

pytestmark = pytest.mark.e2e
TARGETS = ("onnx", "tflite", "coreml")


@pytest.fixture(params=TARGETS)
def bundle(request, built: Callable[[str, str], Path]) -> Path:
    return built(request.param, "fp16")


def artifact_of(bundle: Path) -> Path:
    return bundle / json.loads((bundle / "manifest.json").read_bytes())["artifact"]


def operations_of(artifact: Path) -> Counter[str]:
    """Operations by type, counted by the format's own tools."""
    if artifact.suffix == ".onnx":
        return Counter(node.op_type for node in onnx.load(artifact).graph.node)
    if artifact.suffix == ".tflite":
        interpreter = Interpreter(model_path=str(artifact))
        return Counter(op["op_name"] for op in interpreter._get_ops_details())
    spec = Model_pb2.Model()
    spec.ParseFromString((artifact / "Data/com.apple.CoreML/model.mlmodel").read_bytes())
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    return Counter(op.type for op in block.operations if op.type != "const")


def test_operations_are_counted_as_other_tools_count_them(bundle):
    found = inspect_path(bundle)["operations"]
    wanted = operations_of(artifact_of(bundle))
    # LiteRT's interpreter adds its delegate's nodes to the file's.
    wanted.pop("DELEGATE", None)
    assert found == wanted
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_size_is_that_of_what_an_app_ships(bundle):
    artifact = artifact_of(bundle)
    files = [artifact] if artifact.is_file() else [f for f in artifact.rglob("*") if f.is_file()]
    assert inspect_path(bundle)["size_bytes"] == sum(file.stat().st_size for file in files)


def test_everything_is_plain_values(bundle, tiny_checkpoint):
    for path in (bundle, tiny_checkpoint):
        facts = inspect_path(path)
        # Anything else would raise here.
        assert json.loads(json.dumps(facts)).keys() == facts.keys()


def test_embedded_metadata_is_text_without_padding(bundle):
    found = inspect_path(bundle)["embedded_metadata"]
    assert found["task"] == "eyelid"
    for key, value in found.items():
        assert isinstance(value, str)
        assert value.isprintable(), key


def test_a_changed_bundle_is_not_described(bundle, tmp_path):
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    artifact = artifact_of(changed)
    file = artifact if artifact.is_file() else next(artifact.rglob("weight.bin"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(TamperedError):
        inspect_path(changed)


def test_inspecting_changes_nothing(bundle):
    def state() -> dict[str, tuple[int, int]]:
        files = [f for f in bundle.rglob("*") if f.is_file()]
        return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}

    before = state()
    inspect_path(bundle)
    assert state() == before


def test_a_checkpoint_is_its_header(tiny_checkpoint):
    facts = json.loads(json.dumps(inspect_path(tiny_checkpoint)))
    with safe_open(tiny_checkpoint, framework="numpy") as file:
        header = json.loads((file.metadata() or {})["config"])
    assert {key: facts[key] for key in header} == header
    assert facts["size_bytes"] == tiny_checkpoint.stat().st_size
