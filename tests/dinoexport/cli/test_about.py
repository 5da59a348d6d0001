"""list, doctor, help and version."""

import pytest

from dinoexport.embedded import EMBEDDED
from dinoexport.recipes import MODIFIERS, PRECISIONS
from dinoexport.targets.table import TABLE as TARGETS
from dinoexport.targets.table import get_target
from dinotrain.backbones.convnets.config import CONVNETS
from dinotrain.backbones.vit import VARIANTS
from dinotrain.tasks import TABLE as TASKS

COMMANDS = (
    "build",
    "verify",
    "reference",
    "predict",
    "inspect",
    "train",
    "evaluate",
    "study",
    "list",
    "doctor",
    "demo",
)


def test_list_names_everything(run) -> None:
    facts = run("list", "--json").json
    assert facts["tasks"].keys() == TASKS.keys()
    assert facts["targets"].keys() == TARGETS.keys()
    assert facts["backbones"].keys() == {"embedded", *VARIANTS, *CONVNETS}
    assert facts["recipes"].keys() == PRECISIONS.keys()
    text = run("list").out
    for entries in facts.values():
        for name in entries:
            assert name in text


def test_list_says_where_a_recipe_runs(run) -> None:
    table = run("list", "recipes", "--json").json
    assert table.keys() == PRECISIONS.keys()
    for name, row in table.items():
        for target in TARGETS:
            assert (row[target] == "-") == (name not in get_target(target).supports)
    text = run("list", "recipes").out
    assert "w8a8:blocks.5.mlp=fp16" in text
    for modifier in MODIFIERS:
        assert f"RECIPE:{modifier}" in text


def test_list_of_one_kind(run) -> None:
    assert run("list", "targets", "--json").json.keys() == {"targets"}
    refused = run("list", "target")
    assert refused.status == 2
    assert "Did you mean 'targets'?" in refused.err


def test_doctor(run) -> None:
    result = run("doctor", "--json")
    checks = {check["name"]: check for check in result.json["checks"]}
    assert {"python", "torch", "onnx", "coremltools", "litert-torch", "free disk"} <= checks.keys()
    assert checks["torch"]["passed"]
    assert result.json["passed"] == all(check["passed"] for check in checks.values())
    assert result.status == (0 if result.json["passed"] else 1)


def test_doctor_finds_what_is_missing(run, monkeypatch) -> None:
    monkeypatch.setattr("dinoexport.doctor._MODULES", {"torch": "torch", "onnx": "no_such_module"})
    monkeypatch.setattr("dinoexport.doctor.MIN_FREE_BYTES", 2**80)
    result = run("doctor", "--json")
    assert result.status == 1
    failed = {check["name"] for check in result.json["checks"] if not check["passed"]}
    assert failed >= {"onnx", "free disk"}
    assert "torch" not in failed
    assert "constraints.txt" in next(
        line for line in run("doctor").out.splitlines() if "onnx" in line
    )


def test_doctor_reads_the_embedded_checkpoint(run, monkeypatch, tmp_path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"broken")
    monkeypatch.setattr("dinoexport.doctor.embedded_checkpoint", lambda task: broken)
    checks = run("doctor", "--json").json["checks"]
    embedded = [check for check in checks if check["name"].startswith("embedded")]
    assert len(embedded) == len(EMBEDDED)
    assert not any(check["passed"] for check in embedded)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(run, command: str) -> None:
    result = run(command, "--help")
    assert result.status == 0
    assert "--json" in result.out


@pytest.mark.parametrize("command", ["synth", "check"])
def test_data_commands_have_json(run, command: str) -> None:
    assert "--json" in run("data", command, "--help").out


def test_help_names_every_command(run) -> None:
    text = run("--help").out
    for command in (*COMMANDS, "data"):
        assert f" {command} " in text


def test_version(run) -> None:
    assert run("--version").out.startswith("dinoexport 0.")


def test_nothing_shows_help(run) -> None:
    result = run()
    assert result.status == 2
    assert "Usage" in result.out + result.err
    assert "Error" not in result.err


@pytest.mark.parametrize(
    ("typed", "meant"), [("biuld", "build"), ("verfy", "verify"), ("insepct", "inspect")]
)
def test_a_misspelt_command(refused, typed: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in refused(typed)
