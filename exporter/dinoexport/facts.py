"""The facts of a build: in its manifest, and as text within the model file itself."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import msgspec

from dinoexport.manifest import (
    CalibrationSummary,
    CheckpointRecord,
    Manifest,
    Verdict,
    describe_inputs,
    describe_preprocessing,
)
from dinoexport.plan import BuildPlan
from dinoexport.quantize.calibration import Calibration
from dinoexport.targets.base import Target
from dinotrain.tasks import get_task

_TOOLS = (
    "dinoexport",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "coremltools",
    "litert-torch",
    "ai-edge-litert",
)


def describe_build(
    plan: BuildPlan,
    target: Target,
    calibration: Calibration | None,
    taps: Mapping[str, str],
    verdict: Verdict,
    sha256: str,
) -> Manifest:
    """Return the manifest of one bundle, its files not recorded yet.

    Args:
        plan: what was built.
        target: what it was built for.
        calibration: what ranges of activations come from, if the recipe has any.
        taps: {tap: value of the artifact}.
        verdict: of parity.
        sha256: of the checkpoint.
    """
    task = get_task(plan.config.task)
    return Manifest(
        name=plan.name,
        task=task.name,
        target=target.name,
        precision=plan.recipe.name,
        layout=plan.request.layout,
        calibration=_summarise(calibration),
        budget=plan.request.budget,
        artifact=f"{plan.name}{target.suffix}",
        minimum_os=target.minimum_os(plan.recipe, plan.request.lower_options),
        inputs=tuple(describe_inputs(task, plan.config.image_size, target.image_input)),
        outputs=task.outputs(plan.config),
        preprocessing=describe_preprocessing(plan.config),
        class_names=plan.config.classes,
        files={},
        checkpoint=CheckpointRecord(
            name=plan.checkpoint.name,
            sha256=sha256,
            trained_on=plan.config.trained_on,
            position_rule=plan.config.backbone.position_rule,
        ),
        taps=dict(taps),
        tools=tool_versions(),
        licence=plan.config.licence,
        notice=plan.config.notice,
        parity=verdict,
    )


def _summarise(calibration: Calibration | None) -> CalibrationSummary | None:
    if calibration is None:
        return None
    pictures = calibration.pictures
    return CalibrationSummary(
        source=pictures.source,
        count=len(pictures.samples),
        seed=pictures.seed,
        sha256=pictures.sha256,
        observer=calibration.observer.name,
    )


def embedded_metadata(plan: BuildPlan, sha256: str) -> dict[str, str]:
    """The facts of the manifest that travel inside the model file itself, as text."""
    task = get_task(plan.config.task)
    outputs = task.outputs(plan.config)
    preprocessing = describe_preprocessing(plan.config)
    facts = {
        "name": plan.name,
        "task": task.name,
        "summary": task.summary,
        "precision": plan.recipe.name,
        "licence": plan.config.licence,
        "notice": plan.config.notice,
        "trained_on": plan.config.trained_on,
        "checkpoint": plan.checkpoint.name,
        "checkpoint_sha256": sha256,
        "outputs": msgspec.json.encode(outputs).decode(),
        "preprocessing": msgspec.json.encode(preprocessing).decode(),
        "tools": msgspec.json.encode(tool_versions()).decode(),
    }
    if plan.config.classes:
        facts["class_names"] = msgspec.json.encode(plan.config.classes).decode()
    facts |= {f"input.{i.name}": i.description for i in task.inputs}
    facts |= {f"output.{o.name}": f"{o.description} ({o.unit})" for o in outputs}
    return facts


def tool_versions() -> dict[str, str]:
    """Versions of the tools that shape an artifact."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
