"""The main job, all stages on one screen: checkpoint → program → artifact → verdict → bundle."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dinoexport.bundle import (
    REFERENCE,
    REPORT,
    artifact_size,
    check_measured,
    lock_output,
    record_files,
    staged,
    write_manifest,
)
from dinoexport.console import Reporter, quiet
from dinoexport.errors import BuildError
from dinoexport.facts import describe_build, embedded_metadata
from dinoexport.graph.capture import CapturedProgram, capture_deploy
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.graph.spill import spill_
from dinoexport.manifest import BudgetRecord, Verdict
from dinoexport.memory import free_bytes, release
from dinoexport.passes.base import apply_passes
from dinoexport.passes.guard_norms import GuardNorms, large_norms
from dinoexport.passes.sequence import LAYOUTS, build_deploy_model
from dinoexport.plan import BuildPlan, BuildRequest, plan_build
from dinoexport.quantize.calibration import (
    Calibration,
    CalibrationSet,
    record_calibration,
    write_record,
)
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.observers import get_observer
from dinoexport.quantize.pictures import pixel_digest, read_calibration_set
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import parse_recipe
from dinoexport.report import render_report
from dinoexport.targets.base import Target
from dinoexport.targets.table import get_target
from dinoexport.verify.parity import verify_artifact
from dinoexport.verify.reference import Reference, make_reference, pick_device, with_deployed
from dinoexport.verify.reference_file import encode_reference
from dinotrain.checkpoint import load_checkpoint
from dinotrain.digests import digest
from dinotrain.errors import DinoError, UsageError
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

LOG = "build.log"
LEAST_COPIES = 2
"""Of the float32 weights that any build holds at once: the file's and the model's, while it is
loaded."""


@dataclass(frozen=True)
class BuiltBundle:
    """One bundle with its verdict."""

    target: str
    precision: str
    path: Path
    size_bytes: int
    verdict: Verdict
    budget: BudgetRecord | None = None


@dataclass(frozen=True)
class BuildResult:
    """All bundles of a request."""

    bundles: tuple[BuiltBundle, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """True if there are bundles and every verdict is a pass."""
        return bool(self.bundles) and all(b.verdict.passed for b in self.bundles)


def _check_memory(weights: int) -> None:
    """Refuse what cannot end well: the system would end the process without a word."""
    needed, free = LEAST_COPIES * weights, free_bytes()
    if free is not None and free < needed:
        raise BuildError(
            f"{free / 2**30:.1f} GiB of memory free, and a build of this model needs at least "
            f"{needed / 2**30:.1f}. Free some, or build a smaller backbone."
        )


def _check_space(weights: int, out: Path) -> None:
    needed, free = 3 * weights + 32 * 2**20, shutil.disk_usage(out).free
    if free < needed:
        raise BuildError(
            f"{out}: {free / 2**20:.0f} MiB free, a build needs about {needed / 2**20:.0f}. "
            "Free some space or give another --out."
        )


def load_model(plan: BuildPlan) -> TaskModel:
    """Load the checkpoint's weights at the size that is built."""
    model, trained = load_checkpoint(plan.checkpoint)
    if trained.image_size == plan.config.image_size:
        return model
    resized = TaskModel(plan.config)
    resized.load_state_dict(model.state_dict())
    return resized.eval().requires_grad_(False)


def make_deploy_model(model: TaskModel, plan: BuildPlan, reference: Reference) -> DeployModel:
    """Return the deploy model of a build: all passes, then those that the recipe and the layout ask
    for.

    Args:
        model: trained, eval mode, on the CPU.
        plan: says recipe and layout.
        reference: its inputs show which LayerNorms half precision needs guarded.
    """
    deploy = build_deploy_model(model)
    if plan.recipe.base.name != "fp32":
        names = reference.large_norms
        if names is None:
            device = pick_device()
            samples = (reference.pixels(index, device) for index in range(reference.samples))
            names = large_norms(deploy.to(device), samples)
        apply_passes(deploy.to("cpu"), [GuardNorms(names)])
    return apply_passes(deploy, LAYOUTS[plan.request.layout])


def build(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Build, verify and put in place one bundle per target.

    Raises:
        DinoError: see the stages; the bundle that stood there before is unchanged.
    """
    plan = plan_build(request)
    if plan.config.notice:
        reporter.say(plan.config.notice)
    for notice in plan.notices:
        reporter.say(notice)
    with lock_output(request.out):
        log = request.out / LOG
        _check_memory(plan.weight_bytes)
        _check_space(plan.weight_bytes, request.out)
        with reporter.step(f"load {plan.checkpoint.name}"):
            model = load_model(plan)
            sha256 = digest(plan.checkpoint)
        with reporter.step("reference (PyTorch float32)"):
            reference = make_reference(model, sha256)
            deploy = make_deploy_model(model, plan, reference)
        # What follows needs the deploy model alone, and large models fill the memory.
        del model
        release(plan.weight_bytes)
        calibration = _calibrate(plan, deploy, reference, reporter)
        with reporter.step(f"prepare for {plan.recipe.name}"):
            layers = prepare_(deploy, plan.recipe, calibration)
            reference = with_deployed(reference, plan.recipe.name, deploy)
        with reporter.step("capture"), quiet(log):
            program = capture_deploy(deploy, plan.recipe, layers)
        del deploy, layers
        program = spill_(program)
        release(plan.weight_bytes)
        return BuildResult(
            tuple(
                _build_one(plan, get_target(name), program, reference, calibration, reporter, log)
                for name in plan.targets
            )
        )


def _calibrate(
    plan: BuildPlan, deploy: DeployModel, reference: Reference, reporter: Reporter
) -> Calibration | None:
    """Run the deploy model on calibration pictures, where the recipe wants that."""
    if not plan.recipe.calibrated:
        return None
    pictures = read_pictures(plan, reference)
    with reporter.step(f"calibrate on {pictures.source}") as step:
        observer = get_observer(plan.request.calibration.observer)
        return calibrate(deploy, pictures, observer, step.update)


def read_pictures(plan: BuildPlan, reference: Reference) -> CalibrationSet:
    """Read the pictures to calibrate on, none of which is a parity sample.

    Raises:
        DinoError: they cannot be used.
    """
    asked = plan.request.calibration
    return read_calibration_set(
        get_task(plan.config.task),
        plan.config.image_size,
        asked.path,
        count=asked.count,
        seed=asked.seed,
        barred={pixel_digest(image) for images in reference.inputs.values() for image in images},
    )


def _build_one(
    plan: BuildPlan,
    target: Target,
    program: CapturedProgram,
    reference: Reference,
    calibration: Calibration | None,
    reporter: Reporter,
    log: Path,
) -> BuiltBundle:
    options = plan.request.lower_options
    task = get_task(plan.config.task)
    bundle_name = plan.bundle_name(target.name)
    sha256 = reference.info.checkpoint_sha256
    with staged(plan.request.out, bundle_name) as folder:
        artifact = folder / f"{plan.name}{target.suffix}"
        metadata = embedded_metadata(plan, sha256)
        with reporter.step(f"lower to {target.name}"), quiet(log), lowering(target.name, log):
            taps = target.lower(program, artifact, options, metadata)
        program.rest()
        release(plan.weight_bytes)
        check_measured(artifact, plan.request.budget)
        with reporter.step(f"verify {target.name}") as step, quiet(log):
            verdict = verify_artifact(
                target, artifact, taps, plan.recipe, reference, task, step.update
            )
        release(plan.weight_bytes)
        (folder / REFERENCE).write_bytes(encode_reference(reference))
        if calibration is not None:
            write_record(folder, record_calibration(calibration, plan.recipe.name, program.layers))
        manifest = describe_build(plan, target, calibration, taps, verdict, sha256)
        (folder / REPORT).write_text(render_report(manifest), encoding="utf-8")
        manifest = msgspec.structs.replace(manifest, files=record_files(folder))
        write_manifest(folder, manifest)
    return BuiltBundle(
        target.name,
        plan.recipe.name,
        plan.request.out / bundle_name,
        artifact_size(manifest),
        verdict,
        plan.request.budget,
    )


@contextmanager
def lowering(name: str, log: Path) -> Iterator[None]:
    """Turn what a converter raises into one line that names the target and the log.

    Args:
        name: of the target.
        log: that receives what the converter says.
    """
    try:
        yield
    except (DinoError, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise BuildError(f"{name}: lowering failed: {reason}. The log has more: {log}") from error


def write_reference(plan: BuildPlan, out: Path, reporter: Reporter) -> Reference:
    """Make a reference file for a checkpoint on this machine's best device."""
    with reporter.step(f"load {plan.checkpoint.name}"):
        model = load_model(plan)
    with reporter.step("reference (PyTorch float32)"):
        reference = make_reference(model, digest(plan.checkpoint))
        # Weights of this recipe are rounded alike everywhere; others come from the bundle.
        deploy = build_deploy_model(model)
        prepare_(deploy, parse_recipe("fp16"))
        reference = with_deployed(reference, "fp16", deploy)
    partial = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(encode_reference(reference))
        partial.replace(out)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be written: {error.strerror}. Give another --out."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return reference
