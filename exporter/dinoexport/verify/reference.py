"""The reference: what the trained PyTorch model gives in float32, on a GPU where there is one.

It is a file: inputs, outputs and a sketch of every tap (some of its elements, always the same), so
that a reference made on one machine checks builds on another, and a bundle carries its own.
"""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from dinoexport.errors import ParityError
from dinoexport.graph.deploy_model import HEAD_TAP, DeployModel
from dinoexport.passes.guard_norms import watch_norms
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.recipes import Recipe
from dinoexport.verify.metrics import max_error, sqnr_db
from dinoexport.verify.norms import Norm, compare_runs, noted_norms
from dinoexport.verify.samples import parity_samples
from dinotrain.backbones.vit import Block, VisionTransformer
from dinotrain.model import TaskModel
from dinotrain.tasks.base import Task

FORMAT_VERSION = 2
SKETCH_SIZE = 1024
PREFIX_SKETCH_SIZE = 256

STRUCTURE_SAMPLES = (0, -1)
"""On which the structure of an artifact is judged: one sample of photographs and one rendered. A
graph and its weights are the same for every picture, so in exact arithmetic a few tell what all
would; errors in the task's unit depend on the picture, and are judged on all."""


class ReferenceInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Header of a reference file."""

    format_version: int = FORMAT_VERSION
    checkpoint_sha256: str
    task: str
    image_size: tuple[int, int]
    device: str
    versions: dict[str, str]
    norms: tuple[Norm, ...]
    deployed: tuple[str, ...] = ("fp32",)


@dataclass(frozen=True)
class Values:
    """Outputs (samples,) and tap sketches (samples, K) by name, float32."""

    outputs: dict[str, np.ndarray]
    taps: dict[str, np.ndarray]

    def at(self, indices: Sequence[int]) -> "Values":
        """Return those of some samples."""
        chosen = list(indices)
        return Values(
            {name: value[chosen] for name, value in self.outputs.items()},
            {name: value[chosen] for name, value in self.taps.items()},
        )


@dataclass(frozen=True)
class Reference:
    """Inputs (samples, H, W, 3) uint8, what the model gives, and with which weights.

    ``exact`` is of every sample; ``deployed`` of ``STRUCTURE_SAMPLES`` in a reference that is made
    now, and of every sample in older ones.

    ``deployed`` is what the deploy graph gives with the numbers of each recipe, by its name. At
    fp32 too: what is folded there (BatchNorm above all) costs digits that the structure of an
    artifact must not answer for.

    ``large_norms`` is what ``large_norms`` finds on these inputs, while it is known: a reference
    that was read from a file does not tell.
    """

    info: ReferenceInfo
    inputs: dict[str, np.ndarray]
    exact: Values
    deployed: dict[str, Values]
    positions: dict[str, np.ndarray] = field(default_factory=dict)
    large_norms: tuple[str, ...] | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Inputs of one sample, {input: (H, W, 3) uint8}."""
        return {name: images[index] for name, images in self.inputs.items()}

    def pixels(self, index: int, device: torch.device) -> tuple[Tensor, ...]:
        """Inputs of one sample as models take them: (1, 3, H, W) float32 of 0..255 each."""
        return tuple(_pixels(image).to(device) for image in self.sample(index).values())

    def norms(self, recipe: Recipe) -> list[Norm]:
        """Every such norm in running order, its epsilon rounded as a recipe has it."""
        if recipe.base.name == "fp32":
            return list(self.info.norms)
        return [
            msgspec.structs.replace(n, epsilon=float(np.float16(n.epsilon)))
            for n in self.info.norms
        ]

    def structural(self, recipe: Recipe) -> Values:
        """Values of the deploy graph with the numbers of a recipe, of ``STRUCTURE_SAMPLES``.

        Raises:
            ParityError: the reference has none for it.
        """
        if recipe.name not in self.deployed:
            raise ParityError(
                f"the reference knows {', '.join(self.deployed)}, and {recipe.name} was built. "
                "Use the bundle's own reference."
            )
        found = self.deployed[recipe.name]
        count = len(next(iter(found.outputs.values())))
        return found if count == len(STRUCTURE_SAMPLES) else found.at(self.few)

    @property
    def few(self) -> list[int]:
        """Which samples ``STRUCTURE_SAMPLES`` are."""
        return _places(self.samples)

    def sketch(self, name: str, value: np.ndarray) -> np.ndarray:
        """Take the recorded elements of a tap, flat."""
        return np.asarray(as_rows(name, value), np.float32).reshape(-1)[self.positions[name]]


def _places(samples: int) -> list[int]:
    return [range(samples)[index] for index in STRUCTURE_SAMPLES]


def _few(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of ``STRUCTURE_SAMPLES``."""
    return {name: images[_places(len(images))] for name, images in inputs.items()}


def as_rows(tap: str, value: Any) -> Any:
    """Return a ViT's tap as rows, whichever layout it is computed in; others as they are.

    The reference has rows, so that one serves builds of both layouts.

    Args:
        tap: its name.
        value: array or tensor, (B, T, D) or (B, D, 1, T).
    """
    of_tokens = tap == "tokens" or tap.startswith("blocks.")
    return value[:, :, 0].swapaxes(1, 2) if of_tokens and value.ndim == 4 else value


def pick_device() -> torch.device:
    """Return the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_reference(
    model: TaskModel, checkpoint_sha256: str, device: torch.device | None = None
) -> Reference:
    """Run the trained model on the parity samples, and its deploy graph, unrounded.

    The deploy graph is shown to equal the training model; ``with_deployed`` adds what it gives
    with the numbers of a recipe.

    Args:
        model: trained, eval mode, float32.
        checkpoint_sha256: recorded; a reference only checks builds of the same file.
        device: default ``pick_device()``.

    Raises:
        ParityError: the model's values are not finite, or the deploy graph leaves the model.
    """
    device = device or pick_device()
    samples = parity_samples(model.task, model.config.image_size)
    names = [i.name for i in model.task.inputs]
    inputs = {name: np.stack([sample[name] for sample in samples]) for name in names}
    with _exact_arithmetic():
        model = model.to(device)
        deploy = build_deploy_model(model).to(device)
        positions: dict[str, np.ndarray] = {}

        def trained(pixels: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            outputs, taps = _run_training(model, pixels, deploy)
            positions.update(positions or _positions(taps, deploy.backbone.prefix_count))
            return outputs, taps

        # What reads large values is watched on every sample, in passes that are run anyway: those
        # of large models take minutes. Both models have the same names for what both have.
        with watch_norms(model) as large:
            exact = _run_all(trained, inputs, positions, device)
        _check_finite(exact)
        few = _few(inputs)
        with watch_norms(deploy) as deploy_large, noted_norms(deploy) as noted:

            def run(pixels: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
                noted.append([])
                return deploy.run(pixels)

            with _sketching(deploy, positions):
                deployed = {"fp32": _run_all(run, few, {}, device)}
        norms = compare_runs(noted)
        _check_deploy(exact.at(_places(len(samples))), deployed["fp32"], model.task)
    model.to("cpu")
    info = ReferenceInfo(
        checkpoint_sha256=checkpoint_sha256,
        task=model.config.task,
        norms=norms,
        image_size=model.config.image_size,
        device=_describe(device),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **({"cuda": torch.version.cuda or ""} if device.type == "cuda" else {}),
        },
    )
    large |= deploy_large
    norm_names = [name for name, module in deploy.named_modules() if type(module) is nn.LayerNorm]
    guarded = tuple(name for name in norm_names if name in large)
    return Reference(info, inputs, exact, deployed, positions, guarded)


def with_deployed(
    reference: Reference, recipe: str, deploy: DeployModel, device: torch.device | None = None
) -> Reference:
    """Add what a prepared deploy model gives on the reference's inputs.

    Args:
        reference: of the same checkpoint.
        recipe: name of what the model was prepared for.
        deploy: see ``prepare_``.
        device: default ``pick_device()``.
    """
    device = device or pick_device()
    with _exact_arithmetic():
        few = _few(reference.inputs)
        with _sketching(deploy.to(device), reference.positions):
            values = _run_all(deploy.run, few, {}, device)
    deploy.to("cpu")
    deployed = reference.deployed | {recipe: values}
    info = msgspec.structs.replace(reference.info, deployed=tuple(deployed))
    return dataclasses.replace(reference, info=info, deployed=deployed)


def with_deployed_of(reference: Reference, recipe: str, own: Reference) -> Reference:
    """Add what a bundle's own reference holds for a recipe to one from elsewhere.

    Raises:
        ParityError: they do not have the same pictures, or look at other elements of the taps.
    """
    if recipe in reference.deployed:
        return reference
    if not (_same(reference.inputs, own.inputs) and _same(reference.positions, own.positions)):
        raise ParityError(
            f"the reference has nothing for {recipe}, and other pictures than the bundle's own. "
            "Make it with the same dinoexport as the bundle."
        )
    deployed = reference.deployed | {recipe: own.deployed[recipe]}
    return dataclasses.replace(reference, deployed=deployed)


def _same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


class _exact_arithmetic:  # noqa: N801 (a context manager)
    """float32 as float32: TF32 off, and deterministic kernels where there is a choice."""

    def __enter__(self) -> None:
        self._flags = (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self._grad = torch.no_grad()
        self._grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._grad.__exit__(*error)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._flags


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (float32, TF32 off)"
    return "CPU (float32); no GPU was used"


def _run_training(
    model: TaskModel, pixels: tuple[Tensor, ...], deploy: DeployModel
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of the training model, and its taps as they pass by: of each block the tokens that
    the deploy graph computes.
    """
    with _seen(model) as seen:
        outputs = model(dict(zip([i.name for i in model.task.inputs], pixels, strict=True)))
    # A model may run its pictures one by one.
    found = {name: torch.cat(seen.pop(name)) for name in list(seen)}
    if not isinstance(model.backbone, VisionTransformer):
        images = model.normalise(torch.cat(pixels))
        found |= dict(model.backbone.trace(images, model.pool.deepest))
    taps = {name: found[name] for name in deploy.tap_names}
    for index, block in enumerate(deploy.blocks):
        for name in (f"blocks.{index}.attn", f"blocks.{index}.mlp"):
            taps[name] = taps[name][:, : block.rows]
    return outputs, taps


@contextmanager
def _seen(model: TaskModel) -> Iterator[dict[str, list[Tensor]]]:
    """Give {tap: values as they are computed}, of a ViT's residual stream and of the last tap."""
    seen: dict[str, list[Tensor]] = {}

    def read(name: str) -> Callable[..., None]:
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs[0])

    def given(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(output)

    last = model.pool if model.pool.gives_vector else model.head
    hooks = [last.register_forward_hook(given(HEAD_TAP[model.pool.gives_vector]))]
    if isinstance(model.backbone, VisionTransformer):
        blocks = cast("list[Block]", list(model.backbone.blocks))
        hooks.append(blocks[0].register_forward_pre_hook(read("tokens")))
        for index, block in enumerate(blocks):
            # The second norm reads the residual stream between attention and MLP.
            hooks.append(block.norm2.register_forward_pre_hook(read(f"blocks.{index}.attn")))
            hooks.append(block.register_forward_hook(given(f"blocks.{index}.mlp")))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


@contextmanager
def _sketching(deploy: DeployModel, positions: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Let a deploy model give sketches in the place of taps.

    All taps of a large model are as much memory as its weights. A ConvNet's pyramid reads its own
    record, so there they are cut afterwards.
    """
    run, record = deploy.run, deploy.backbone.record

    def sketch(name: str, value: Tensor) -> Tensor:
        places = torch.from_numpy(positions[name].astype(np.int64)).to(value.device)
        return as_rows(name, value).reshape(-1)[places]

    class Sketches(dict[str, Tensor]):
        def __setitem__(self, name: str, value: Tensor) -> None:
            super().__setitem__(name, sketch(name, value))

    def run_and_cut(
        pixels: tuple[Tensor, ...],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs, taps = run(pixels)
        return outputs, {name: sketch(name, value) for name, value in taps.items()}

    if deploy.blocks:
        deploy.backbone.record = Sketches()
    else:
        deploy.run = run_and_cut  # type: ignore[method-assign]
    try:
        yield
    finally:
        deploy.backbone.record = record
        deploy.__dict__.pop("run", None)


def _run_all(
    run, inputs: dict[str, np.ndarray], positions: Mapping[str, np.ndarray], device: torch.device
) -> Values:
    """Run samples; taps that ``positions`` does not name are sketches already."""
    outputs: dict[str, list[np.ndarray]] = {}
    taps: dict[str, list[np.ndarray]] = {}
    for index in range(len(next(iter(inputs.values())))):
        pixels = tuple(_pixels(images[index]).to(device) for images in inputs.values())
        got, inner = run(pixels)
        for name, value in got.items():
            outputs.setdefault(name, []).append(value[0].cpu().numpy())
        for name, value in inner.items():
            if name in positions:
                value = as_rows(name, value).reshape(-1)[torch.from_numpy(positions[name]).long()]
            taps.setdefault(name, []).append(value.cpu().numpy())
        # Taps of a large model fill the memory twice where the next ones come before these go.
        del got, inner
    return Values(
        {name: np.stack(values).astype(np.float32) for name, values in outputs.items()},
        {name: np.stack(values).astype(np.float32) for name, values in taps.items()},
    )


def _positions(taps: Mapping[str, Tensor], prefix: int) -> dict[str, np.ndarray]:
    """Which elements of each flat tap are kept: some of all tokens, and some of the prefix."""
    rng = np.random.Generator(np.random.PCG64(7))
    positions = {}
    for name, value in taps.items():
        flat = np.arange(value.numel()).reshape(value.shape)
        chosen = [rng.choice(flat.reshape(-1), min(SKETCH_SIZE, flat.size), replace=False)]
        if flat.ndim == 3 and prefix:
            # CLS and registers are few among the tokens, and a fault may sit in them alone.
            first = flat[:, :prefix].reshape(-1)
            chosen.append(rng.choice(first, min(PREFIX_SKETCH_SIZE, first.size), replace=False))
        positions[name] = np.unique(np.concatenate(chosen)).astype(np.int32)
    return positions


def _check_finite(exact: Values) -> None:
    for name, value in (exact.taps | exact.outputs).items():
        if not np.isfinite(value).all():
            raise ParityError(
                f"the checkpoint gives values that are not finite at {name}, so there is nothing "
                "to compare with. Train it again, or give another --checkpoint."
            )


def _check_deploy(training: Values, deploy: Values, task: Task) -> None:
    budget = task.budgets.deploy
    for name, value in training.outputs.items():
        error = max_error(value, deploy.outputs[name], task.error)
        if error > budget:
            raise ParityError(
                f"the deploy graph's {name} leaves the training model by {error:.2g}, "
                f"budget {budget:g}. This is a fault of dinoexport; please report it."
            )
    for name, value in training.taps.items():
        if sqnr_db(value, deploy.taps[name]) < 100:
            raise ParityError(
                f"the deploy graph leaves the training model at {name}. "
                "This is a fault of dinoexport; please report it."
            )
