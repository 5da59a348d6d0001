"""data check for every task, --skip-unreadable on every command that reads data, and --dry-run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = ("--image-size", "56")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Thirty cats and six dogs, a monochrome one among them."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(36):
        picture(folder / ("cat" if number < 30 else "dog") / f"{number}.png", number)
    with Image.open(folder / "dog" / "35.png") as image:
        image.convert("L").save(folder / "dog" / "35.png")
    return folder


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory) -> Path:
    """Twelve pictures with masks, dust in the half of them."""
    folder = tmp_path_factory.mktemp("surfaces")
    for number in range(12):
        picture(folder / "images" / f"{number:02}.png", number)
        ids = np.zeros((56, 56), np.uint8)
        ids[:7] = number % 2
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(ids).save(folder / "masks" / f"{number:02}.png")
    (folder / "classes.txt").write_text("ground\ndust\nscratch")
    return folder


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> Path:
    from dinotrain.tasks import get_task

    folder = tmp_path_factory.mktemp("eyes")
    get_task("eyelid").synthesise(10, 1, folder)
    return folder


def test_check_of_classes(run, photos) -> None:
    facts = run("data", "check", photos, "--task", "classify", "--json").json
    assert facts["classes"] == {"cat": 30, "dog": 6}
    assert sum(facts["class_splits"]["cat"].values()) == 30
    assert facts["shares"]["cat"]["train"] == pytest.approx(24 / 28)
    assert facts["notes"] == ["class 'dog' has 4 training samples: fewer than 10"]
    text = run("data", "check", photos, "--task", "classify").out
    assert "share of train samples" in text
    cat = next(line for line in text.splitlines() if line.startswith("cat"))
    assert cat.split() == ["cat", "24", "3", "3", "85.7", "%"]
    assert "note         class 'dog' has 4 training samples" in text


def test_check_of_masks(run, surfaces) -> None:
    facts = run("data", "check", surfaces, "--task", "segment", "--json").json
    assert facts["classes"] == {"ground": 12, "dust": 6, "scratch": 0}
    assert facts["shares_of"] == "pixels"
    assert 0 < facts["shares"]["dust"]["train"] < 0.125
    assert "class 2 'scratch' is empty: no sample shows it" in facts["notes"]
    text = run("data", "check", surfaces, "--task", "segment").out
    assert "share of train pixels" in text


def test_check_of_measures(run, eyes) -> None:
    facts = run("data", "check", eyes, "--json").json
    assert facts["labels"]["mrd1_mm"]["train"]["count"] == facts["splits"]["train"]
    low, high = (facts["labels"]["lf_mm"]["train"][name] for name in ("low", "high"))
    assert 0 <= low < high < 32
    text = run("data", "check", eyes).out
    assert "lf_mm        train" in text
    assert facts["fingerprint"] in text


@pytest.mark.parametrize(
    ("task", "source", "victim", "left"),
    [
        ("eyelid", "eyes", "images/*primary*", 9),
        ("classify", "photos", "dog/30.png", 35),
        ("segment", "surfaces", "masks/03.png", 11),
    ],
)
def test_what_cannot_be_read_is_named_or_left_out(
    run, refused, request, tmp_path, task, source, victim, left
) -> None:
    data = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "data"))
    file = sorted(data.glob(victim))[0]
    file.write_bytes(file.read_bytes()[:-40])
    check = ("data", "check", data, "--task", task)
    error = refused(*check)
    assert file.name in error
    assert "--skip-unreadable" in error
    result = run(*check, "--skip-unreadable")
    assert f"samples      {left}" in result.out
    assert "left out" in result.out
    (skipped,) = run(*check, "--skip-unreadable", "--json").json["skipped"]
    assert file.name in skipped
    train = ("train", "--data", data, "--task", task, "--out", tmp_path / "m.safetensors", *SIZE)
    assert file.name in refused(*train, "--dry-run")
    planned = run(*train, "--dry-run", "--skip-unreadable", "--json", "--cache", tmp_path / "c")
    assert planned.json["data"]["skipped"] == [skipped]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_train_evaluate_and_probe_go_on_without_it(run, refused, photos, tmp_path) -> None:
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    (data / "cat" / "7.png").write_bytes(b"x")
    out, cache = tmp_path / "m.safetensors", ("--cache", tmp_path / "cache", *SIZE)
    train = ("train", "--data", data, "--task", "classify", "--head", "linear", "--out", out)
    assert "cat/7.png" in refused(*train, *cache)
    done = run(*train, *cache, "--epochs", 1, "--skip-unreadable")
    assert done.status == 0, done.err
    assert "left out 1 picture that cannot be read:" in done.err
    assert "training samples by class: dog 4, cat 23" in done.err
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert "Samples by class" in page
    assert "cat/7.png" in page
    evaluate = ("evaluate", out, "--data", data, *cache[:2])
    assert "cat/7.png" in refused(*evaluate)
    found = run(*evaluate, "--skip-unreadable", "--json").json
    assert len(found["skipped"]) == 1
    probe = ("probe", "--data", data, "--out", tmp_path / "p.safetensors", "--iterations", 2)
    assert "cat/7.png" in refused(*probe, *cache)
    assert run(*probe, *cache, "--skip-unreadable").status == 0


def test_a_dry_run_says_what_a_run_would_do(run, eyes, tmp_path) -> None:
    out, cache = tmp_path / "new" / "m.safetensors", tmp_path / "cache"
    train = ("train", "--data", eyes, "--out", out, "--cache", cache, *SIZE, "--dry-run")
    plan = run(*train, "--head", "ensemble", "--json").json
    assert plan["recipe"]["head"]["kind"] == "ensemble"
    assert plan["parameters"]["trained"] < plan["parameters"]["whole"]
    assert plan["shapes"]["inputs"] == {name: [1, 3, 56, 56] for name in ("primary", "up", "down")}
    assert [spec["unit"] for spec in plan["shapes"]["outputs"]] == ["mm"] * 6
    text = run(*train).out
    for part in ("splits ", "input        primary 1×3×56×56", "head ", "parameters ", str(out)):
        assert part in text
    assert list(tmp_path.iterdir()) == []
