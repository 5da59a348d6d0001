"""What outlier channels do to W8A8, and what mends it: ``python -m dinobench.outliers``.

A classifier of digits on a backbone of DINOv2-B's size with planted outlier channels
(``dinobench.planted``) is quantised by several recipes, and reads digits that it was not fitted on:
in PyTorch with rounded activations, and as real artifacts. Exit status: 0 plain W8A8 collapses and
smoothed W8A8 stays within 1 % of fp32, 1 it is not so.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from dinobench.machine import Machine, describe_machine
from dinobench.planted import Digits, classify, planted_model, read_digits

if TYPE_CHECKING:
    from dinoexport.quantize.calibration import Calibration
    from dinotrain.backbones.vit import ViTConfig

RECIPES = ("fp32", "w8", "w8a8", "w8a8:smooth", "w8a8:smooth,bias", "w8a8:outliers")
MLPS_DYNAMIC = "w8a8:smooth,blocks.*.mlp=w8a8-dynamic"
BUILT = {"tflite": ("w8a8", MLPS_DYNAMIC, "w8a8-dynamic:smooth")}
"""Recipes of which artifacts are made, where they are not the first and the smoothed one. LiteRT's
int8 layers of static ranges give int8 as well, and no smoothing reaches what a layer gives: MLPs
with outliers in their hidden units take dynamic ranges there, whose results are float."""
MENDED = ("w8a8:smooth", MLPS_DYNAMIC)
CALIBRATION = 32
SIDE = 56
COLLAPSE = 0.8
"""Share of fp32's accuracy that plain W8A8 falls below."""
KEEP = 0.99
"""Share that smoothed W8A8 keeps."""
SIMULATED = "PyTorch, activations rounded"


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Share of the digits that one recipe reads right."""

    recipe: str
    runtime: str
    accuracy: float


class OutlierReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one run of ``dinobench.outliers`` found."""

    schema: str = "dinobench.outliers"
    schema_version: int = 1
    machine: Machine
    model: str
    pictures: int
    """That accuracy is taken on; none was fitted or calibrated on."""
    peak_ratio: float
    """Peak of the farthest channel over the median one's, in the worst layer."""
    rows: tuple[Accuracy, ...]
    passed: bool


def run(
    small: Annotated[bool, typer.Option(help="128 channels, 6 blocks: seconds.")] = False,
    train: Annotated[int, typer.Option(min=100, help="Pictures to fit the head on.")] = 1200,
    test: Annotated[int, typer.Option(min=100, max=500, help="Pictures to judge on.")] = 400,
    target: Annotated[
        str, typer.Option(help="Targets to build too, by commas; nothing for none.")
    ] = "onnx,tflite",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the accuracy of each recipe, in PyTorch and as artifacts."""
    targets = [name for name in target.split(",") if name]
    report = study(small_config() if small else base_config(), train, test, targets)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        typer.echo(render(report), nl=False)
    raise typer.Exit(0 if report.passed else 1)


def base_config() -> "ViTConfig":
    """Return DINOv2-B's size, at 56 pixels."""
    from dinotrain.backbones.vit import ViTConfig

    return ViTConfig(
        name="DINOv2-B's size", embed_dim=768, depth=12, heads=12, ffn_dim=3072, grid=(4, 4)
    )


def small_config() -> "ViTConfig":
    """Return something that tests can afford."""
    from dinotrain.backbones.vit import ViTConfig

    return ViTConfig(name="small", embed_dim=128, depth=6, heads=4, ffn_dim=512, grid=(4, 4))


def study(config: "ViTConfig", train: int, test: int, targets: list[str]) -> OutlierReport:
    """Quantise the planted model by every recipe and judge each.

    Args:
        config: of the backbone.
        train: pictures that the head is fitted on.
        test: pictures to judge on.
        targets: names of those that are built.
    """
    from dinoexport.passes.sequence import build_deploy_model
    from dinoexport.quantize.calibration import CalibrationSet
    from dinoexport.quantize.collect import calibrate
    from dinoexport.quantize.pictures import set_digest

    fitted, held = read_digits(SIDE, train, test)
    deploy = build_deploy_model(planted_model(config, fitted, seed=1))
    samples = [{"image": image} for image in fitted.images[:CALIBRATION]]
    pictures = CalibrationSet(tuple(samples), "digits", 0, set_digest(samples))
    calibration = calibrate(deploy, pictures)
    inside = [s for name, s in calibration.layers.items() if name.startswith("blocks.")]
    rows = [*_simulated(deploy, calibration, held)]
    for name in targets:
        rows += _built(deploy, calibration, held, name)
    return OutlierReport(
        machine=describe_machine(),
        model=f"{config.name}: {config.embed_dim} wide, {config.depth} blocks, planted outliers",
        pictures=test,
        peak_ratio=round(max(s.input.peak_ratio for s in inside), 1),
        rows=tuple(rows),
        passed=judge(rows),
    )


def judge(rows: list[Accuracy]) -> bool:
    """Return whether plain W8A8 collapses and smoothed W8A8 keeps up, wherever they were run."""
    exact = next(row.accuracy for row in rows if row.recipe == "fp32")
    plain = [row.accuracy for row in rows if row.recipe == "w8a8"]
    smoothed = [row.accuracy for row in rows if row.recipe in MENDED]
    return max(plain) < COLLAPSE * exact and min(smoothed) >= KEEP * exact


def render(report: OutlierReport) -> str:
    """Render as Markdown, the same text for the same report."""
    lines = ["| recipe | runtime | accuracy |", "|---|---|--:|"]
    lines += [f"| {row.recipe} | {row.runtime} | {row.accuracy:.4f} |" for row in report.rows]
    lines += [
        "",
        f"{report.model}; the farthest channel reaches {report.peak_ratio:g} times as far as the "
        f"median one; {report.pictures} digits that were not fitted on. Plain W8A8 below "
        f"{COLLAPSE:.0%} of fp32 and smoothed within {1 - KEEP:.0%}: "
        + ("holds" if report.passed else "BROKEN"),
    ]
    return "\n".join(lines) + "\n"


def _simulated(deploy: Any, calibration: "Calibration", held: Digits) -> Iterator[Accuracy]:
    from dinoexport.quantize.prepare import prepare_
    from dinoexport.quantize.simulate import simulated
    from dinoexport.recipes import parse_recipe

    for recipe in RECIPES:
        model = copy.deepcopy(deploy)
        layers = prepare_(model, parse_recipe(recipe), calibration)
        with simulated(model, layers):
            right = classify(model, held.images) == held.labels
        yield Accuracy(recipe=recipe, runtime=SIMULATED, accuracy=float(right.mean()))


def _built(
    deploy: Any, calibration: "Calibration", held: Digits, target: str
) -> Iterator[Accuracy]:
    from dinoexport.graph.capture import capture_deploy
    from dinoexport.quantize.prepare import prepare_
    from dinoexport.recipes import parse_recipe
    from dinoexport.targets.base import LowerOptions
    from dinoexport.targets.table import get_target

    kind = get_target(target)
    for name in BUILT.get(target, ("w8a8", "w8a8:smooth")):
        recipe = parse_recipe(name)
        kind.check(recipe)
        model = copy.deepcopy(deploy)
        layers = prepare_(model, recipe, calibration)
        program = capture_deploy(model, recipe, layers)
        with tempfile.TemporaryDirectory(prefix="dinobench-") as folder:
            path = Path(folder) / f"planted{kind.suffix}"
            kind.lower(program, path, LowerOptions(), {})
            runtime = kind.runtime(path)
            found = [
                int(runtime.run({"image": image}).outputs["probabilities"].argmax())
                for image in held.images
            ]
        right = [digit == wanted for digit, wanted in zip(found, held.labels, strict=True)]
        yield Accuracy(recipe=name, runtime=runtime.name, accuracy=sum(right) / len(right))


if __name__ == "__main__":
    typer.run(run)
