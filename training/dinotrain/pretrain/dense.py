"""Train a small DINOv2-architecture backbone from scratch on rendered eyes, with dense labels.

It makes the backbone of the embedded default model. Labels inside the picture (classes of half
patches, the height of margins and reflex) teach a small transformer in an hour on a laptop what
would take days from whole-image labels. Downstream only CLS‖mean-patch is read, so the same
heights are also asked of those pooled features. Nothing here has seen a photograph.

    python -m dinotrain.pretrain.dense --out FILE.safetensors [--minutes 45 | --steps 3000]

Source: METHODS A1 (architecture), B2, B3 (targets, window), B6 (what a head reads).
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from dinotrain.backbones.vit import BackboneOutput, VisionTransformer, ViTConfig, init_weights_
from dinotrain.errors import DinoError, UsageError
from dinotrain.pretrain.eye_pool import CROP_PX, MARGIN_PX, POINTS, PX_PER_MM, EyePool, load_pool

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CLASSES = 6
CELLS = 2
"""Each patch is labelled in CELLS × CELLS parts: 7 pixels, 1.25 mm."""

HEIGHTS = ("reflex-upper", "lower-reflex", "canthi-upper", "upper", "lower", "reflex", "canthi")
"""Heights in mm asked of every picture; the first three are what the eyelid task measures."""

BINS, BIN_LOW_MM, BIN_MM = 64, -10.0, 0.4
"""The first three heights are also classified, smoothly, into bins from −10 to 15.6 mm."""

PATCH_ROWS = 16
EYE_ROWS = (2, 13)
"""Rows of patches that can hold a lid margin; early training looks only at these, which makes it
half as fast again and costs nothing, because the later part sees whole pictures."""

EYE_ROWS_SHARE = 0.55
SHIFT_PX = 8
WARMUP_SHARE = 0.04

console = Console(stderr=True, soft_wrap=True)


class DenseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; stored in the weights' header."""

    eyes: int = 6000
    held_out_eyes: int = 700
    seed: int = 101
    batch_eyes: int = 6
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.05
    minutes: float = 45.0
    steps: int = 0
    """Above 0: exactly so many steps, and the result repeats; else as many as fit the minutes."""
    eval_minutes: float = 10.0


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """Mean absolute errors in mm on subjects that neither backbone nor probe has seen."""

    mrd1_mm: float
    mrd2_mm: float
    lf_mm: float
    mean_mrd1_mm: float
    mean_mrd2_mm: float
    mean_lf_mm: float
    eyes_fitted: int
    eyes_tested: int


class Batch(NamedTuple):
    """E eyes × 3 gazes, flattened to B = 3·E pictures.

    ``images`` (B, 3, 224, 224) float32 in 0..1 · ``cells`` (B, 6, 32, 32) class shares ·
    ``heights`` (B, len(HEIGHTS)) mm · ``lf`` (E,) mm.
    """

    images: Tensor
    cells: Tensor
    heights: Tensor
    lf: Tensor


class PooledHeads(nn.Module):
    """What is asked of the features while training; thrown away afterwards."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cells = nn.Linear(dim, CLASSES * CELLS * CELLS)
        self.patch_heights = nn.Linear(dim, len(HEIGHTS))
        self.heights = nn.Linear(2 * dim, len(HEIGHTS))
        self.bins = nn.Linear(2 * dim, 3 * BINS)
        self.lf = nn.Sequential(
            nn.LayerNorm(6 * dim), nn.Linear(6 * dim, 128), nn.GELU(), nn.Linear(128, 1)
        )


def tiny_config(depth: int = 6) -> ViTConfig:
    """Return the architecture: ViT-Tiny's width on 16 × 16 patches of 14 pixels."""
    return ViTConfig(
        name="vitti14_eyes",
        embed_dim=192,
        depth=depth,
        heads=3,
        ffn_dim=768,
        grid=(PATCH_ROWS, PATCH_ROWS),
        position_rule="size",
    )


@torch.no_grad()
def start_fast_(model: VisionTransformer) -> VisionTransformer:
    """Give a fresh backbone weights of full size and positions that already tell places apart.

    With an hour to train, half of it would go into growing the usual small weights and into
    finding out where each patch is. Positions start as sines and cosines of row and column.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
    rows, columns = model.config.grid
    quarter = model.config.embed_dim // 4
    speed = 10.0 ** (-2 * torch.arange(quarter) / quarter)
    by_row = torch.arange(rows)[:, None] * speed
    by_column = torch.arange(columns)[:, None] * speed
    down = torch.cat((by_row.sin(), by_row.cos()), dim=1)[:, None].expand(-1, columns, -1)
    along = torch.cat((by_column.sin(), by_column.cos()), dim=1)[None].expand(rows, -1, -1)
    waves = torch.cat((down, along), dim=-1).reshape(rows * columns, -1)
    model.pos_embed[0, 1:, : waves.shape[1]] = 0.5 * waves
    return model


def encode(
    model: VisionTransformer, images: Tensor, rows: tuple[int, int] | None = None
) -> BackboneOutput:
    """Run the backbone on some rows of patches, each with the position it has in the picture.

    Args:
        model: the backbone.
        images: (B, 3, 224, 224), normalised.
        rows: first and one past the last row of patches; None for all.
    """
    if rows is None:
        return model(images)
    size, (_, columns) = model.config.patch_size, model.config.grid
    first, last = rows
    position = model.position(model.config.grid)[:, first * columns : last * columns]
    patches = model.patch_embed(images[:, :, first * size : last * size]) + position
    x = torch.cat((model.prefix().expand(images.shape[0], -1, -1), patches), dim=1)
    for block in model.blocks:
        x = block(x)
    return model.split(model.norm(x))


def pooled(output: BackboneOutput) -> Tensor:
    """CLS‖mean-patch: (B, 2·D) float32. Source: METHODS B6."""
    return torch.cat((output.cls_token, output.patch_tokens.mean(dim=1)), dim=-1).float()


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 → ImageNet-normalised."""
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    return (images - mean) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


def heights_of(points: NDArray[np.float32], shift_mm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn points (B, 6, 2) and the crops' shifts (B,) downwards in mm into HEIGHTS (B, 7)."""
    y = {name: points[:, i, 1] - shift_mm for i, name in enumerate(POINTS)}
    canthi = (y["nasal"] + y["temporal"]) / 2
    upper, lower, reflex = y["upper"], y["lower"], y["reflex"]
    columns = (reflex - upper, lower - reflex, canthi - upper, upper, lower, reflex, canthi)
    return np.stack(columns, axis=1).astype(np.float32)


def take(pool: EyePool, eyes: NDArray[np.int64], shifts: NDArray[np.int64]) -> Batch:
    """Cut a batch out of the pool.

    Args:
        pool: where from.
        eyes: (E,) numbers of eyes.
        shifts: (3·E, 2) how far each crop moves right and down, in pixels, −11..11.
    """
    images, cells = [], []
    for number, (right, down) in enumerate(shifts):
        eye, gaze = eyes[number // 3], number % 3
        top, left = MARGIN_PX + down, MARGIN_PX + right
        window = (slice(top, top + CROP_PX), slice(left, left + CROP_PX))
        images.append(pool.images[eye, gaze][window])
        cells.append(pool.classes[eye, gaze][window])
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    classes = torch.from_numpy(np.stack(cells))
    shares = torch.stack([(classes == c).float() for c in range(CLASSES)], dim=1)
    points = pool.points[eyes].reshape(-1, len(POINTS), 2)
    heights = heights_of(points, (shifts[:, 1] / PX_PER_MM).astype(np.float32))
    return Batch(
        pictures.contiguous(),
        F.avg_pool2d(shares, 14 // CELLS),
        torch.from_numpy(heights),
        torch.from_numpy(pool.labels[eyes, 2]),
    )


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change light, colour, sharpness and noise of (B, 3, H, W) in 0..1, each picture its own way.

    Never mirrors or scales: orientation and millimetres carry the labels.
    """
    count = images.shape[0]

    def normal(channels: int, sd: float) -> Tensor:
        return torch.randn(count, channels, 1, 1, generator=generator) * sd

    def some(share: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < share).float()

    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    # Above 1 blurs, below 0 sharpens.
    images = images + (soft - images) * (normal(1, 0.5) + 0.4 * some(0.3))
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    images = images + (coarse - images) * some(0.12)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (1 + normal(1, 0.25)).clamp_min(0) * (1 - some(0.06))
    images = images * torch.exp(normal(3, 0.06) + normal(1, 0.16))
    images = 0.45 + (images - 0.45) * torch.exp(normal(1, 0.16)) + normal(1, 0.05)
    noise = torch.randn(images.shape, generator=generator)
    images = images + noise * (torch.rand(count, 1, 1, 1, generator=generator) * 0.04 * some(0.6))
    return images.clamp(0, 1)


def losses(output: BackboneOutput, heads: PooledHeads, batch: Batch, rows: tuple[int, int] | None):
    """Return the sum of all losses and the plain errors in mm of the first three heights."""
    first, last = rows or (0, PATCH_ROWS)
    patches = output.patch_tokens.float()
    count, _, _ = patches.shape
    logits = heads.cells(patches).reshape(count, last - first, PATCH_ROWS, CLASSES, CELLS, CELLS)
    # (B, rows, cols, class, y, x) → (B, class, rows·2, cols·2)
    logits = logits.permute(0, 3, 1, 4, 2, 5).reshape(count, CLASSES, -1, PATCH_ROWS * CELLS)
    dense = F.cross_entropy(logits, batch.cells[:, :, first * CELLS : last * CELLS])

    z = pooled(output)
    guess = heads.heights(z) * 4
    error = (guess - batch.heights).abs()
    per_patch = (heads.patch_heights(patches) * 4 - batch.heights[:, None]).abs().mean()

    centres = BIN_LOW_MM + BIN_MM * (torch.arange(BINS) + 0.5)
    near = torch.exp(-((batch.heights[:, :3, None] - centres) / 0.5).square() / 2)
    wanted = near / near.sum(dim=-1, keepdim=True).clamp_min(1e-6)
    bins = F.cross_entropy(heads.bins(z).reshape(-1, BINS), wanted.reshape(-1, BINS))

    by_gaze = z.reshape(-1, 3, z.shape[-1])
    up, down = by_gaze[:, 1], by_gaze[:, 2]
    lf = heads.lf(torch.cat((up, down, up - down), dim=-1))[:, 0] * 4 + 10
    # Canthi-to-upper of up-gaze less that of down-gaze is LF, whatever the crops' shifts.
    drop = guess.reshape(-1, 3, len(HEIGHTS))[:, :, 2]
    lf_error = (lf - batch.lf).abs().mean() + ((drop[:, 1] - drop[:, 2]) - batch.lf).abs().mean()

    primary = error.reshape(-1, 3, len(HEIGHTS))[:, 0, :2].mean()
    total = (
        1.5 * dense
        + 0.3 * per_patch
        + 0.6 * error[:, :3].mean()
        + 0.6 * primary
        + 0.2 * error[:, 3:].mean()
        + 0.3 * lf_error
        + 0.25 * bins
    )
    return total, error[:, :3].detach().mean(dim=0)


@torch.inference_mode()
def pooled_features(model: VisionTransformer, pool: EyePool) -> Tensor:
    """Return CLS‖mean-patch of undisturbed centre crops: (E, 3, 2·D) float32."""
    found = []
    for start in range(0, len(pool.labels), 8):
        eyes = np.arange(start, min(start + 8, len(pool.labels)))
        batch = take(pool, eyes, np.zeros((3 * len(eyes), 2), dtype=np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(normalise(batch.images))
        found.append(pooled(output).reshape(len(eyes), 3, -1))
    return torch.cat(found)


def probe(features: Tensor, labels: Tensor, fit: int, ridge: float = 3.0) -> ProbeResult:
    """Fit ridge regressions on the first ``fit`` eyes' features and test them on the rest.

    Args:
        features: (E, 3, 2·D), gazes primary, up, down.
        labels: (E, 3) mm: MRD1, MRD2, LF.
        fit: eyes to fit on; the mean predictor beside it uses their mean.
        ridge: penalty on standardised features.
    """
    if not 2 <= fit < len(features):
        raise UsageError(
            f"cannot fit a probe on {fit} of {len(features)} eyes and test on the rest"
        )
    primary, up, down = features.unbind(dim=1)
    inputs = (primary, primary, up - down)
    errors, baselines = [], []
    for column, x in enumerate(inputs):
        y = labels[:, column].double()
        mean, sd = x[:fit].mean(dim=0), x[:fit].std(dim=0) + 1e-6
        x = ((x - mean) / sd).double()
        centre = y[:fit].mean()
        gram = x[:fit].T @ x[:fit] + ridge * torch.eye(x.shape[1], dtype=torch.double)
        weights = torch.linalg.solve(gram, x[:fit].T @ (y[:fit] - centre))
        errors.append(float((x[fit:] @ weights + centre - y[fit:]).abs().mean()))
        baselines.append(float((centre - y[fit:]).abs().mean()))
    rounded = [round(value, 4) for value in (*errors, *baselines)]
    return ProbeResult(
        mrd1_mm=rounded[0],
        mrd2_mm=rounded[1],
        lf_mm=rounded[2],
        mean_mrd1_mm=rounded[3],
        mean_mrd2_mm=rounded[4],
        mean_lf_mm=rounded[5],
        eyes_fitted=fit,
        eyes_tested=len(features) - fit,
    )


def save_backbone(model: VisionTransformer, path: Path, training: dict[str, object]) -> None:
    """Write float32 weights in the hub's key layout, in one step.

    The header holds the architecture under ``backbone`` and the training's summary under
    ``training``, both as JSON.
    """
    state = {key: value.detach().float().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        "backbone": msgspec.json.encode(model.config).decode(),
        "training": msgspec.json.encode(training).decode(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(state, name, metadata=metadata)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def train(
    config: DenseConfig, vit: ViTConfig, pool: EyePool, held_out: EyePool, out: Path
) -> ProbeResult:
    """Train and keep the best weights (by the probe on held-out subjects) in ``out``.

    Args:
        config: how.
        vit: the architecture; its grid is 16 × 16.
        pool: eyes to train on.
        held_out: eyes of other subjects; the probe fits on five sevenths and tests on the rest.
        out: a .safetensors file, written again whenever the probe improves.

    Returns:
        The probe's errors of the kept weights.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    picks = np.random.default_rng(config.seed)
    model = start_fast_(init_weights_(VisionTransformer(vit)))
    heads = PooledHeads(vit.embed_dim)
    matrices = [p for p in (*model.parameters(), *heads.parameters()) if p.ndim > 1]
    vectors = [p for p in (*model.parameters(), *heads.parameters()) if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.98),
    )
    started, step, best = time.monotonic(), 0, None
    due = config.eval_minutes * 60
    running = torch.zeros(3)
    log: list[dict[str, object]] = []
    with _progress() as report:
        while True:
            elapsed = time.monotonic() - started
            share = step / config.steps if config.steps else elapsed / (60 * config.minutes)
            done = share >= 1
            if step and (done or (not config.steps and elapsed >= due)):
                due = elapsed + config.eval_minutes * 60
                result = _evaluate(model, held_out)
                note = {
                    "step": step,
                    "minutes": round(elapsed / 60, 2),
                    **msgspec.to_builtins(result),
                }
                log.append(note)
                console.print(
                    f"step {step} · {elapsed / 60:.1f} min · held-out MAE mm "
                    f"{result.mrd1_mm:.3f} {result.mrd2_mm:.3f} {result.lf_mm:.3f} · mean "
                    f"{result.mean_mrd1_mm:.3f} {result.mean_mrd2_mm:.3f} {result.mean_lf_mm:.3f}"
                )
                if best is None or _score(result) < _score(best):
                    best = result
                    save_backbone(model, out, _summary(config, note, log))
            if done:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(share)
            eyes = picks.choice(len(pool.labels), config.batch_eyes, replace=False)
            shifts = picks.integers(-SHIFT_PX, SHIFT_PX + 1, (3 * config.batch_eyes, 2))
            batch = take(pool, eyes, shifts)
            rows = EYE_ROWS if share < EYE_ROWS_SHARE else None
            images = normalise(disturb(batch.images, generator))
            with torch.autocast("cpu", torch.bfloat16):
                output = encode(model, images, rows)
            total, errors = losses(output, heads, batch, rows)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)
            optimizer.step()
            step += 1
            running += (errors - running) / min(step, 50)
            report(share, step, total.item(), running)
    if best is None:
        raise UsageError("no step was trained. Give more --minutes or --steps.")
    return best


def _schedule(share: float) -> float:
    """Linear warm-up, then a cosine down to 1 % of the learning rate."""
    if share < WARMUP_SHARE:
        return (share + 0.002) / (WARMUP_SHARE + 0.002)
    rest = (share - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(rest, 1)))


def _score(result: ProbeResult) -> float:
    """LF is in the larger unit; halving it weighs all three alike."""
    return result.mrd1_mm + result.mrd2_mm + 0.5 * result.lf_mm


def _evaluate(model: VisionTransformer, held_out: EyePool) -> ProbeResult:
    model.eval()
    features = pooled_features(model, held_out)
    model.train()
    # Chunks end on even numbers, and pairs of eyes share a subject: an even cut splits none.
    fit = len(features) * 5 // 7 // 2 * 2
    return probe(features, torch.from_numpy(held_out.labels), fit)


def _summary(
    config: DenseConfig, note: dict[str, object], log: list[dict[str, object]]
) -> dict[str, object]:
    return {
        "method": "dense supervision on rendered eyes, from random weights; no photograph was used",
        "config": msgspec.to_builtins(config),
        "torch": str(torch.__version__),
        "kept": note,
        "log": log,
    }


@contextmanager
def _progress() -> Iterator:
    """Yield a report function: a bar on a terminal, a plain line every 25 steps elsewhere."""
    if not console.is_terminal:

        def plain(share: float, step: int, loss: float, errors: Tensor) -> None:
            if step % 25 == 0:
                found = " ".join(f"{value:.2f}" for value in errors.tolist())
                print_line = f"{100 * share:5.1f} % · step {step} · loss {loss:.3f} · mm {found}"
                console.print(print_line, highlight=False)

        yield plain
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=1.0)

        def moving(share: float, step: int, loss: float, errors: Tensor) -> None:
            found = " ".join(f"{value:.2f}" for value in errors.tolist())
            text = f"step {step} · loss {loss:.3f} · mm {found}"
            bar.update(task, completed=share, description=text)

        yield moving


def main(
    out: Annotated[Path, typer.Option(help="Weights to write, .safetensors.")],
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 45.0,
    steps: Annotated[int, typer.Option(help="Instead of minutes: exactly so many steps.")] = 0,
    eyes: Annotated[int, typer.Option(help="Eyes to render and train on.")] = 6000,
    held_out_eyes: Annotated[int, typer.Option(help="Eyes for the probe.")] = 700,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 101,
    depth: Annotated[int, typer.Option(help="Blocks of the backbone.")] = 6,
    threads: Annotated[int, typer.Option(help="Threads, and processes that render.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Where rendered eyes are kept.")] = None,
) -> None:
    """Train a small backbone on rendered eyes."""
    try:
        if out.suffix != ".safetensors":
            raise UsageError(f"--out {out} must end in .safetensors")
        torch.set_num_threads(threads)
        folder = cache or Path(tempfile.gettempdir()) / "dinotrain-eyes"

        def rendered(done: int, chunks: int) -> None:
            console.print(f"rendered {done} of {chunks} parts", highlight=False)

        config = DenseConfig(
            eyes=eyes, held_out_eyes=held_out_eyes, seed=seed, minutes=minutes, steps=steps
        )
        pool = load_pool(eyes, seed, folder, threads, rendered)
        # Another seed renders other subjects.
        held_out = load_pool(held_out_eyes, seed + 1, folder, threads, rendered)
        result = train(config, tiny_config(depth), pool, held_out, out)
        console.print(f"kept in {out}: {msgspec.json.encode(result).decode()}", highlight=False)
    except DinoError as error:
        console.print(f"{type(error).__name__}: {error}", highlight=False)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
