"""The main job, all stages on one screen: checkpoint → program → artifact → verdict → bundle."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from dinoexport.bundle import (
    REFERENCE,
    REPORT,
    Bundle,
    artifact_size,
    check_files,
    check_measured,
    lock_output,
    open_bundle,
    record_files,
    staged,
    write_manifest,
)
from dinoexport.console import Reporter, quiet
from dinoexport.embedded import embedded_checkpoint
from dinoexport.errors import BuildError, ParityError
from dinoexport.graph.capture import CapturedProgram, capture_deploy
from dinoexport.graph.deploy_model import DeployModel
from dinoexport.manifest import (
    BudgetRecord,
    CalibrationSummary,
    CheckpointRecord,
    Manifest,
    Verdict,
    describe_inputs,
    describe_preprocessing,
)
from dinoexport.memory import free_bytes, release
from dinoexport.passes.base import apply_passes
from dinoexport.passes.guard_norms import GuardNorms, large_norms
from dinoexport.passes.sequence import LAYOUTS, build_deploy_model
from dinoexport.quantize.calibration import (
    Calibration,
    CalibrationSet,
    record_calibration,
    write_record,
)
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.observers import DEFAULT_OBSERVER, get_observer
from dinoexport.quantize.pictures import DEFAULT_COUNT, pixel_digest, read_calibration_set
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import Recipe, parse_recipe
from dinoexport.report import render_report
from dinoexport.targets.base import LowerOptions, Target
from dinoexport.targets.table import TABLE, expand_targets, get_target
from dinoexport.verify.parity import verify_artifact
from dinoexport.verify.reference import (
    Reference,
    encode_reference,
    load_reference,
    make_reference,
    pick_device,
    with_deployed,
    with_deployed_of,
)
from dinotrain.backbones.vit import ViTConfig
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint, read_config
from dinotrain.digests import digest
from dinotrain.errors import CheckpointError, DinoError, UsageError, unknown_name
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

LOG = "build.log"
LEAST_COPIES = 2
"""Of the float32 weights that any build holds at once: the file's and the model's, while it is
loaded."""
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


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on, and how; looked at only where a recipe wants calibration.

    Attributes:
        path: see ``read_calibration_set``; None renders pictures.
        count: of samples.
        seed: of their choice.
        observer: by name.
    """

    path: Path | None = None
    count: int = DEFAULT_COUNT
    seed: int = 0
    observer: str = DEFAULT_OBSERVER


@dataclass(frozen=True)
class BuildRequest:
    """One ``build`` command."""

    task: str
    target: str
    out: Path
    checkpoint: Path | None = None
    precision: str = "fp16"
    image_size: tuple[int, int] | None = None
    minimum_ios: int = 17
    layout: str = "tokens"
    calibration: CalibrationRequest = CalibrationRequest()
    budget: BudgetRecord | None = None
    """What the recipe was chosen to hold, of one target."""

    @property
    def lower_options(self) -> LowerOptions:
        """What targets are told."""
        return LowerOptions(self.minimum_ios, self.layout)


@dataclass(frozen=True)
class BuildPlan:
    """What a request comes to, checked; what ``--dry-run`` prints."""

    request: BuildRequest
    checkpoint: Path
    config: CheckpointConfig
    recipe: Recipe
    name: str
    targets: tuple[str, ...]
    weight_bytes: int
    """Of the checkpoint, in float32."""

    def bundle_name(self, target: str) -> str:
        """Name of one target's bundle folder."""
        return f"{self.name}-{target}"

    @property
    def stem(self) -> str:
        """Name without the recipe."""
        return "".join(self.name.rsplit(f"-{self.recipe.name}", 1))

    @property
    def notices(self) -> tuple[str, ...]:
        """What the targets have to say of the recipe, a line each."""
        options = self.request.lower_options
        lines = (get_target(name).notice(self.recipe, options) for name in self.targets)
        return tuple(line for line in lines if line)


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


def plan_build(request: BuildRequest) -> BuildPlan:
    """Check a request against its checkpoint, reading only the header.

    Raises:
        UsageError: an unknown task, target or precision.
        CheckpointError: no such checkpoint, or it was trained for another task or size.
        BuildError: a target's format cannot hold so many weights.
    """
    get_task(request.task)
    targets = expand_targets(request.target)
    recipe = parse_recipe(request.precision)
    get_observer(request.calibration.observer)
    for name in targets:
        get_target(name).check(recipe)
    path = request.checkpoint or embedded_checkpoint(request.task)
    config = read_config(path)
    if config.task != request.task:
        raise CheckpointError(
            f"{path.name} was trained for task {config.task}, not {request.task}. "
            f"Use --task {config.task}."
        )
    config = _resize(config, request.image_size, path)
    weights = _weight_bytes(path)
    for name in targets:
        get_target(name).check_weights(weights)
    size = "x".join(map(str, dict.fromkeys(config.image_size)))
    _check_layout(request.layout, targets, config, path)
    name = f"{config.task}-{_short(config.backbone.name)}-{size}-{recipe.name}"
    name += "" if request.layout == "tokens" else f"-{request.layout}"
    return BuildPlan(request, path, config, recipe, name, tuple(targets), weights)


def _weight_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weights in float32, from its header; 0 where that is corrupt, which
    loading says better.
    """
    with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
        names = file.keys()
        return 4 * sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return 0


def _check_memory(weights: int) -> None:
    """Refuse what cannot end well: the system would end the process without a word."""
    needed, free = LEAST_COPIES * weights, free_bytes()
    if free is not None and free < needed:
        raise BuildError(
            f"{free / 2**30:.1f} GiB of memory free, and a build of this model needs at least "
            f"{needed / 2**30:.1f}. Free some, or build a smaller backbone."
        )


def _check_layout(
    layout: str, targets: Sequence[str], config: CheckpointConfig, path: Path
) -> None:
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    lacking = next((name for name in targets if layout not in get_target(name).layouts), None)
    if lacking is not None:
        having = [name for name in TABLE if layout in get_target(name).layouts]
        raise UsageError(
            f"--layout {layout} is not one of {lacking}. Use --target {','.join(having)}, or "
            f"--layout tokens."
        )
    if layout != "tokens" and not isinstance(config.backbone, ViTConfig):
        raise UsageError(
            f"--layout {layout} is one of tokens, and {path.name} has a convolutional backbone, "
            f"{config.backbone.name}, which has none. Use --layout tokens."
        )


def _short(backbone: str) -> str:
    return backbone.removeprefix("dinov2_").replace("/", "_")


def _resize(config: CheckpointConfig, size: tuple[int, int] | None, path: Path) -> CheckpointConfig:
    if size is None or size == config.image_size:
        return config
    asked = f"{path.name} was trained for image size {config.image_size[0]}, and --image-size"
    step, least = config.backbone.size_step, config.backbone.least_size
    bad = next((side for side in size if side < least or side % step), None)
    if bad is not None and step > 1:
        below = max(bad // step, 1) * step
        raise CheckpointError(
            f"{asked} {bad} is not a multiple of the patch size {step}. "
            f"Use {below} or {below + step}."
        )
    if bad is not None:
        raise CheckpointError(f"{asked} {bad} is under {least}. Use {least} or more.")
    if max(size) > 1036:
        raise CheckpointError(
            f"--image-size {max(size)} is over 1036, twice what DINOv2 was trained at. "
            "Use a smaller one."
        )
    return msgspec.structs.replace(config, image_size=size)


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
        with reporter.step(f"load {plan.checkpoint.name}"):
            model = load_model(plan)
            sha256 = digest(plan.checkpoint)
        _check_space(model, request.out)
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
        del deploy
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
    with staged(plan.request.out, bundle_name) as folder:
        artifact = folder / f"{plan.name}{target.suffix}"
        metadata = embedded_metadata(plan, reference.info.checkpoint_sha256)
        with reporter.step(f"lower to {target.name}"), quiet(log), lowering(target.name, log):
            taps = target.lower(program, artifact, options, metadata)
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
        manifest = Manifest(
            name=plan.name,
            task=task.name,
            target=target.name,
            precision=plan.recipe.name,
            layout=plan.request.layout,
            calibration=_summarise(calibration),
            budget=plan.request.budget,
            artifact=artifact.name,
            minimum_os=target.minimum_os(plan.recipe, options),
            inputs=tuple(describe_inputs(task, plan.config.image_size, target.image_input)),
            outputs=task.outputs(plan.config),
            preprocessing=describe_preprocessing(plan.config),
            class_names=plan.config.classes,
            files={},
            checkpoint=CheckpointRecord(
                name=plan.checkpoint.name,
                sha256=reference.info.checkpoint_sha256,
                trained_on=plan.config.trained_on,
                position_rule=plan.config.backbone.position_rule,
            ),
            taps=taps,
            tools=tool_versions(),
            licence=plan.config.licence,
            notice=plan.config.notice,
            parity=verdict,
        )
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


def _check_space(model: TaskModel, out: Path) -> None:
    weights = sum(p.numel() * 4 for p in model.parameters())
    needed = 3 * weights + 32 * 2**20
    free = shutil.disk_usage(out).free
    if free < needed:
        raise BuildError(
            f"{out}: {free / 2**20:.0f} MiB free, a build needs about {needed / 2**20:.0f}. "
            "Free some space or give another --out."
        )


def verify_bundle(path: Path, reference_file: Path | None, reporter: Reporter) -> Verdict:
    """Repeat the verdict of a bundle, against its own reference or another one.

    Raises:
        BundleError: the bundle is not what was built.
        ParityError: the reference is of another checkpoint, or cannot be compared.
    """
    bundle = open_bundle(path)
    check_files(bundle)
    manifest = bundle.manifest
    reference = load_reference(reference_file or bundle.reference)
    _check_reference(reference, bundle, reference_file)
    recipe = parse_recipe(manifest.precision)
    if reference_file:
        own = load_reference(bundle.reference)
        reference = with_deployed_of(reference, recipe.name, own)
    target = get_target(manifest.target)
    log = Path(os.devnull)
    with reporter.step(f"verify {manifest.artifact}") as step, quiet(log):
        return verify_artifact(
            target,
            bundle.artifact,
            manifest.taps,
            recipe,
            reference,
            get_task(manifest.task),
            step.update,
        )


def _check_reference(reference: Reference, bundle: Bundle, file: Path | None) -> None:
    manifest = bundle.manifest
    where = file or bundle.reference
    if reference.info.checkpoint_sha256 != manifest.checkpoint.sha256:
        raise ParityError(
            f"{where} was made from checkpoint {reference.info.checkpoint_sha256[:12]}, the bundle "
            f"was built from {manifest.checkpoint.sha256[:12]} ({manifest.checkpoint.name}). "
            "Make the reference from that one."
        )
    size = manifest.inputs[0].shape[-3:-1]
    if tuple(size) != reference.info.image_size:
        raise ParityError(
            f"{where} was made at {reference.info.image_size}, the bundle reads {tuple(size)}. "
            "Give `dinoexport reference` the same --image-size."
        )


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
