"""study: the three experiments from the command line, and what is refused."""

import pytest

from dinotrain.study.plan import STUDIES, Study


@pytest.fixture
def short_study(monkeypatch) -> str:
    """One of the studies, cut to two variants."""
    whole = STUDIES["ensemble"]
    fields = {name: getattr(whole, name) for name in Study.__struct_fields__}
    groups = {"MSE": whole.groups["MSE"]}
    monkeypatch.setitem(STUDIES, "ensemble", Study(**{**fields, "groups": groups}))
    return "ensemble"


def test_a_study_prints_its_tables_and_goes_on(run, short_study, tiny_checkpoint, tmp_path) -> None:
    arguments = ("study", short_study, "--count", 12, "--backbone", tiny_checkpoint)
    arguments += ("--image-size", 28, "--seeds", 2, "--epochs", 1, "--out", tmp_path / "s")
    arguments += ("--cache", tmp_path / "cache", "--device", "cpu")
    first = run(*arguments)
    assert first.status == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].startswith("Mean absolute error in mm on ")
    assert any(line.startswith("mean predictor") for line in lines)
    assert "paired t-test over 2 seeds" in first.out
    assert lines[-1] == str(tmp_path / "s" / "report.html")
    assert lines[-2].startswith("Trained on synthetic images only")
    again = run(*arguments, "--json")
    assert "render" not in again.err
    found = again.json
    assert found["seeds"] == 2
    assert [row["variant"] for row in found["variants"]] == ["MLP", "ensemble of 5"]
    mean = found["variants"][0]["outputs"]["lf_mm"]["figures"]["mae_mm"]["mean"]
    assert f"{mean:.3f} ± " in first.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ensembel", "--out", "x"], "Did you mean 'ensemble'?"),
        (["focal", "--out", "x", "--seeds", 0], "Invalid value '0' for '--seeds'"),
        (["focal", "--out", "x", "--backbone", "dinov3"], "unknown backbone 'dinov3'"),
        (["focal"], "Missing option '--out'"),
        (["focal", "--out", "x", "--task", "segment"], "study focal is of task eyelid"),
        (["recipes", "--out", "x", "--task", "segment"], "Name them with --data"),
        (["recipes", "--out", "x", "--data", "."], "task eyelid has no recipes to compare"),
    ],
)
def test_studies_that_cannot_be_run(refused, arguments, says, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused("study", *arguments)


def test_recipes_side_by_side(run, tiny_checkpoint, tmp_path) -> None:
    data, out = tmp_path / "gazes", tmp_path / "both"
    assert run("data", "synth", "--task", "classify", "--count", 30, "--out", data).status == 0
    arguments = ("study", "recipes", "--task", "classify", "--data", data, "--out", out)
    arguments += ("--backbone", tiny_checkpoint, "--image-size", 28, "--epochs", 1, "--seeds", 2)
    arguments += ("--cache", tmp_path / "cache", "--device", "cpu")
    result = run(*arguments)
    assert result.status == 0, result.err
    for words in (
        "transfer: frozen",
        "finetune: finetune",
        "test, mean of 2",
        "standard deviation",
    ):
        assert words in result.out
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "finetune-0.safetensors",
        "finetune-1.safetensors",
        "transfer-0.safetensors",
        "transfer-1.safetensors",
    ]
    found = run(*arguments, "--json").json
    accuracy = found["transfer"]["probabilities"]["accuracy"]
    assert f"{accuracy:.4g}" in result.out
