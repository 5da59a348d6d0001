"""Commands around a build: build, verify, reference."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dinoexport.cli.app import Checkpoint, ImageSize, Json, Seed, TaskName, app
from dinoexport.cli.budget import AUTO, build_by_budget
from dinoexport.cli.output import (
    FAILED,
    check_file,
    check_folder,
    one_line,
    parse_size,
    print_json,
)
from dinotrain.errors import UsageError


@app.command()
def build(
    task: TaskName,
    target: Annotated[str, typer.Option(help="onnx, coreml, tflite, several with commas, or all.")],
    out: Annotated[Path, typer.Option(help="Folder that receives one bundle per target.")] = Path(
        "artifacts"
    ),
    checkpoint: Checkpoint = None,
    precision: Annotated[
        str, typer.Option(help="A recipe, see `dinoexport list recipes`; or auto.")
    ] = "fp16",
    image_size: ImageSize = None,
    minimum_ios: Annotated[
        int, typer.Option(min=16, max=18, help="Core ML only: 16, 17 or 18.")
    ] = 17,
    layout: Annotated[
        str,
        typer.Option(
            help="tokens; ane: columns and 1×1 convolutions, for the Neural Engine; cpu: ONNX with "
            "onnxruntime's own attention."
        ),
    ] = "tokens",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Labelled data of the task, a folder of pictures, or a .txt list of them, for "
            "recipes with int8 or int16 activations; rendered pictures if left out."
        ),
    ] = None,
    calibration_count: Annotated[
        int | None,
        typer.Option(help="Samples to calibrate on; as many as hold 64 pictures by default."),
    ] = None,
    observer: Annotated[
        str, typer.Option(help="How ranges are chosen: min-max, percentile, mse, entropy.")
    ] = "min-max",
    seed: Seed = 0,
    max_error_mm: Annotated[
        float | None, typer.Option(min=0, help="With --precision auto, task eyelid.")
    ] = None,
    max_top1_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --precision auto, task classify.")
    ] = None,
    max_miou_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --precision auto, task segment.")
    ] = None,
    prefer: Annotated[
        str, typer.Option(help="With --precision auto: the least size, or speed.")
    ] = "size",
    held_out: Annotated[
        int, typer.Option(min=8, help="With --precision auto: samples that recipes are judged on.")
    ] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built.")] = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint into verified artifacts, one bundle per target."""
    from dinoexport.pipeline import build as run_build
    from dinoexport.plan import BuildRequest, CalibrationRequest, plan_build

    request = BuildRequest(
        task=task,
        target=target,
        out=out,
        checkpoint=checkpoint,
        precision=precision,
        image_size=parse_size(image_size),
        minimum_ios=minimum_ios,
        layout=layout,
        calibration=CalibrationRequest(calibration, calibration_count, seed, observer),
    )
    drops = {
        "max-error-mm": max_error_mm,
        "max-top1-drop": max_top1_drop,
        "max-miou-drop": max_miou_drop,
    }
    if precision == AUTO:
        build_by_budget(request, drops, prefer, held_out, dry_run, json)
        return
    given = next((name for name, value in drops.items() if value is not None), None)
    if given is not None:
        raise UsageError(f"--{given} is a budget of --precision auto, and {precision} is asked for")
    plan = plan_build(request)
    check_folder(out)
    if dry_run:
        _print_plan(plan, json)
        return
    from dinoexport.console import Reporter

    result = run_build(request, Reporter())
    print_bundles(result.bundles, json)
    if not result.passed:
        raise typer.Exit(FAILED)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `build` wrote.")],
    reference: Annotated[
        Path | None, typer.Option(help="A file of `dinoexport reference`, made on a GPU, say.")
    ] = None,
    json: Json = False,
) -> None:
    """Repeat the parity verdict of a bundle; files that were changed since are a FAIL."""
    from dinoexport.console import Reporter
    from dinoexport.errors import TamperedError
    from dinoexport.reverify import verify_bundle

    try:
        verdict = verify_bundle(bundle, reference, Reporter())
    except TamperedError as error:
        if json:
            print_json({"passed": False, "error": one_line(str(error)), "kind": "TamperedError"})
        else:
            typer.echo(f"FAIL  {one_line(str(error))}")
        raise typer.Exit(FAILED) from None
    if json:
        print_json(_plain(verdict))
    else:
        print_verdict(str(bundle), verdict)
    if not verdict.passed:
        raise typer.Exit(FAILED)


@app.command()
def reference(
    out: Annotated[Path, typer.Option(help="The file to write; ends in .safetensors.")],
    task: TaskName = "eyelid",
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    json: Json = False,
) -> None:
    """Write what the PyTorch model gives, on a GPU where there is one, for `verify --reference`."""
    from dinoexport.console import Reporter
    from dinoexport.pipeline import write_reference
    from dinoexport.plan import BuildRequest, plan_build

    check_file(out, ".safetensors")
    plan = plan_build(
        BuildRequest(task, "all", out.parent, checkpoint, "fp32", parse_size(image_size))
    )
    made = write_reference(plan, out, Reporter())
    if json:
        print_json(
            {
                "path": str(out),
                "device": made.info.device,
                "versions": made.info.versions,
                "samples": made.samples,
            }
        )
        return
    typer.echo(f"{out}: {made.samples} samples on {made.info.device}")


def _print_plan(plan: Any, json: bool) -> None:
    facts = {
        "checkpoint": str(plan.checkpoint),
        "backbone": plan.config.backbone.name,
        "image_size": list(plan.config.image_size),
        "precision": plan.recipe.name,
        "bundles": [str(plan.request.out / plan.bundle_name(t)) for t in plan.targets],
        "notice": plan.config.notice,
        "notices": list(plan.notices),
    }
    if json:
        print_json({"dry_run": True} | facts)
        return
    height, width = facts.pop("image_size")
    for key, value in (facts | {"image size": f"{height}×{width} (height × width)"}).items():
        for line in value if isinstance(value, list) else [value]:
            typer.echo(f"{key:11} {one_line(str(line))}")
    typer.echo("nothing was written (--dry-run)")


def _plain(record: Any) -> dict[str, Any]:
    import msgspec

    return msgspec.to_builtins(record)


def bundle_json(bundle: Any) -> dict[str, Any]:
    """What `build --json` says of one bundle."""
    facts = {
        "target": bundle.target,
        "precision": bundle.precision,
        "path": str(bundle.path),
        "passed": bundle.verdict.passed,
        "size_bytes": bundle.size_bytes,
        "parity": _plain(bundle.verdict),
    }
    return facts if bundle.budget is None else facts | {"budget": _plain(bundle.budget)}


def print_bundles(bundles: Any, json: bool, more: dict[str, Any] | None = None) -> None:
    """Print what was built, with its verdicts."""
    if json:
        passed = bool(bundles) and all(b.verdict.passed for b in bundles)
        print_json({"passed": passed, "bundles": [bundle_json(b) for b in bundles]} | (more or {}))
        return
    for bundle in bundles:
        print_verdict(str(bundle.path), bundle.verdict, bundle.size_bytes)
        if bundle.budget:
            kept = bundle.budget
            typer.echo(
                f"      budget        {kept.measured:.2g} {kept.unit} of {kept.allowed:g} allowed, "
                f"on {kept.samples} held-out samples"
            )


def print_verdict(title: str, verdict: Any, size_bytes: int | None = None) -> None:
    """Print a verdict as lines of text."""
    size = f", {size_bytes / 1e6:.1f} MB" if size_bytes else ""
    typer.echo(f"{'PASS' if verdict.passed else 'FAIL'}  {title}{size}")
    for name, output in verdict.outputs.items():
        typer.echo(
            f"      {name:13} {output.max_error:.2g} {output.unit} of {output.budget:g} allowed, "
            f"{output.sqnr_db:g} dB{'' if output.passed else '  FAIL'}"
        )
    structure = verdict.structure
    typer.echo(
        f"      structure     {structure.worst_db:g} dB at {structure.worst_tap}, "
        f"{structure.threshold_db:g} wanted{'' if structure.passed else '  FAIL'}"
    )
    if verdict.similarity:
        similarity = verdict.similarity
        typer.echo(
            f"      similarity    {similarity.worst_cosine:g} at {similarity.worst_tap}, "
            f"{similarity.threshold:g} wanted{'' if similarity.passed else '  FAIL'}"
        )
    typer.echo(f"      run by        {verdict.runtime}")
    typer.echo(f"      reference     {verdict.reference.device}")
    if verdict.blame:
        typer.echo(f"      blame         {verdict.blame.message}")
