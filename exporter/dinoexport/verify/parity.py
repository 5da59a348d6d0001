"""Compare an artifact with its reference: structure at every tap, precision in the task's units.

Structure runs the shipped file in exact arithmetic against torch with the same rounded weights,
and looks at every tap, because final outputs alone are blind (a zeroed attention can hide behind a
head). Precision runs the file as it is shipped against the full-precision reference.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dinoexport.errors import ParityError
from dinoexport.manifest import (
    Blame,
    OutputParity,
    ReferenceRecord,
    Similarity,
    Structure,
    TapParity,
    Verdict,
)
from dinoexport.memory import release
from dinoexport.recipes import Activations, Precision, Recipe, parse_recipe
from dinoexport.targets.base import Runtime, Target, artifact_bytes
from dinoexport.verify.blame import blame_outputs, blame_similarity, blame_structure
from dinoexport.verify.metrics import cosine, max_error, sqnr_db
from dinoexport.verify.norms import Norm
from dinoexport.verify.reference import Reference, Values
from dinotrain.tasks.base import Task

STRUCTURE_DB = 110.0
"""Clean builds measure 114 to 150 dB in exact arithmetic (200 where every bit is the same, as Core
ML's evaluator gives), planted faults at most 96 (FINDINGS; the tests plant them anew)."""

LEAST_COSINE = {8: 0.98, 6: 0.95, 4: 0.9}
"""By the bits of the coarsest weights, at every tap and for every sample."""

EPSILON_TOLERANCE = 1e-3
"""Relative. A stored epsilon is rounded once, to float32 (6e-8) or as the reference is."""

Progress = Callable[[int, int], None]


def verify_artifact(
    target: Target,
    path: Path,
    taps: Mapping[str, str],
    recipe: Recipe,
    reference: Reference,
    task: Task,
    progress: Progress | None = None,
) -> Verdict:
    """Run an artifact three ways on the reference's inputs and give a verdict.

    Args:
        target: the artifact's format.
        path: the artifact.
        taps: {tap: value inside the artifact}.
        recipe: chooses the budget and the rounded reference.
        reference: inputs and expected values.
        task: gives units and budgets.
        progress: called with (runs done, runs in all).

    Raises:
        ParityError: artifact and reference do not have the same outputs or taps.
        BundleError: the artifact cannot be loaded.
    """
    # Angles are judged of quantised recipes alone, and then on every sample.
    some = recipe.is_float and target.taps_disturb
    tapped = reference.few if some else list(range(reference.samples))
    tick = _Ticker(progress, reference.samples + len(tapped) + len(reference.few))
    name, as_shipped, precise = _run_shipped(target, path, taps, reference, tapped, tick)
    wanted = reference.structural(recipe)
    exact_name, exact = _run_exact(target, path, taps, reference, wanted, task, tick)

    outputs = judge_outputs(as_shipped, reference.exact, task, recipe)
    structural = judge_outputs(exact, wanted, task, parse_recipe("fp32"))
    full = reference.exact.at(tapped)
    tap_parity = {
        name: TapParity(
            structure_db=round(sqnr_db(wanted.taps[name], exact.taps[name]), 1),
            precision_db=round(sqnr_db(full.taps[name], precise.taps[name]), 1),
            cosine=round(least_cosine(full.taps[name], precise.taps[name]), 5),
        )
        for name in taps
    }
    worst = min(tap_parity, key=lambda name: tap_parity[name].structure_db)
    forms = tuple(sorted(target.gelu_forms(path)))
    epsilons = target.norm_epsilons(path)
    wrong_norms = compare_norms(epsilons, reference.norms(recipe))
    structure = Structure(
        runtime=exact_name,
        samples=len(reference.few),
        threshold_db=STRUCTURE_DB,
        worst_tap=worst,
        worst_db=tap_parity[worst].structure_db,
        gelu=forms,
        epsilons=tuple(sorted({float(f"{epsilon:.4g}") for epsilon in epsilons})),
        passed=tap_parity[worst].structure_db >= STRUCTURE_DB
        and all(output.passed for output in structural.values())
        and set(forms) <= {"exact"}
        and not wrong_norms,
    )
    similarity = judge_similarity(tap_parity, recipe)
    blame: Blame | None = None
    if not structure.passed:
        blame = blame_structure(tap_parity, structural, STRUCTURE_DB, forms, wrong_norms)
    elif not all(output.passed for output in outputs.values()):
        blame = blame_outputs(tap_parity, outputs, recipe)
    elif similarity and not similarity.passed:
        blame = blame_similarity(tap_parity, similarity, recipe)
    return Verdict(
        passed=blame is None,
        runtime=name,
        reference=ReferenceRecord(
            device=reference.info.device,
            versions=reference.info.versions,
            samples=reference.samples,
            checkpoint_sha256=reference.info.checkpoint_sha256,
        ),
        outputs=outputs,
        structure=structure,
        similarity=similarity,
        taps=tap_parity,
        blame=blame,
    )


def _run_shipped(
    target: Target,
    path: Path,
    taps: Mapping[str, str],
    reference: Reference,
    tapped: Sequence[int],
    tick: Callable[[], None],
) -> tuple[str, Values, Values]:
    """Run the file as it ships on every sample, and with its taps on some.

    Taps as outputs may keep a runtime from fusing, so what apps run is run too. Where both are
    asked for on every sample, and give the same bits on a few, they do the same: the others are
    not run twice.

    Returns:
        What ran it; outputs of every sample; outputs and taps of ``tapped``.
    """
    precise = run_samples(target.runtime(path, taps), reference, tick, tapped)
    release(artifact_bytes(path))
    _check_names(precise.outputs, reference.exact.outputs, "output", path)
    runtime = target.runtime(path)
    every = list(range(reference.samples))
    if list(tapped) == every:
        few = reference.few if target.taps_disturb else []
        first = run_samples(runtime, reference, lambda: None, few)
        if not few or _same_bits(first.outputs, precise.at(few).outputs):
            for _ in every:
                tick()
            return runtime.name, Values(precise.outputs, {}), precise
    shipped = run_samples(runtime, reference, tick, every)
    _check_names(shipped.outputs, reference.exact.outputs, "output", path)
    return runtime.name, shipped, precise


def _same_bits(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].tobytes() == right[n].tobytes() for n in left
    )


def _run_exact(
    target: Target,
    path: Path,
    taps: Mapping[str, str],
    reference: Reference,
    wanted: Values,
    task: Task,
    tick: Callable[[], None],
) -> tuple[str, Values]:
    """Run the exact form of a file by the fastest kernels that hold the structural gate.

    Fast kernels may lose digits in their sums, and they make no wrong graph right: what holds the
    gate in any of them is what the reference computes. The last kernels have the last word.

    Returns:
        What ran it; outputs and taps of ``STRUCTURE_SAMPLES``.
    """
    name, found = "", Values({}, {})
    for open_runtime in target.exact_runtimes(path, taps):
        release(artifact_bytes(path))
        runtime = open_runtime()
        name, found = runtime.name, run_samples(runtime, reference, tick, reference.few)
        # Before what it held is collected, here or at the next one.
        del runtime
        _check_names(found.taps, wanted.taps, "tap", path)
        least = min(sqnr_db(wanted.taps[tap], found.taps[tap]) for tap in taps)
        outputs = judge_outputs(found, wanted, task, parse_recipe("fp32"))
        if least >= STRUCTURE_DB and all(output.passed for output in outputs.values()):
            break
    release(artifact_bytes(path))
    return name, found


def least_cosine(reference: np.ndarray, actual: np.ndarray) -> float:
    """Return the cosine of the sample that is farthest off; arrays are (samples, K)."""
    if reference.shape != actual.shape:
        return -1.0
    return min(cosine(a, b) for a, b in zip(reference, actual, strict=True))


def judge_similarity(taps: Mapping[str, TapParity], recipe: Recipe) -> Similarity | None:
    """Judge the taps of a quantised recipe by their angles; nothing at fp32 and fp16.

    Integers differ from processor to processor element by element (FINDINGS), and angles do not.
    """
    if recipe.is_float:
        return None
    threshold = LEAST_COSINE[min(precision.bits for precision in recipe.precisions)]
    worst = min(taps, key=lambda name: taps[name].cosine)
    return Similarity(
        threshold=threshold,
        worst_tap=worst,
        worst_cosine=taps[worst].cosine,
        passed=taps[worst].cosine >= threshold,
    )


def compare_norms(epsilons: Sequence[float], wanted: Sequence[Norm]) -> dict[str, str]:
    """Compare the LayerNorms of an artifact with those of the reference.

    Converters may reorder what does not depend on each other, so the layer is exact only where
    the order is kept; that one differs is certain.

    Args:
        epsilons: of the artifact, in running order.
        wanted: of the reference, in running order.

    Returns:
        {layer: what is wrong there}, empty where all agree.
    """
    left = list(epsilons)
    missing: list[Norm] = []
    # Those that may be left out come last, so that they do not take another one's place.
    for norm in sorted(wanted, key=lambda norm: norm.optional):
        place = next((i for i, e in enumerate(left) if _same_epsilon(e, norm)), None)
        if place is not None:
            del left[place]
        elif not norm.optional:
            missing.append(norm)
    if not left and not missing:
        return {}
    if len(epsilons) == len(wanted):
        wrong: dict[str, str] = {}
        for found, norm in zip(epsilons, wanted, strict=True):
            if not _same_epsilon(found, norm):
                text = f"LayerNorm has epsilon {found:.4g} where {norm.epsilon:.4g} is wanted"
                wrong.setdefault(norm.layer, text)
        return wrong
    if missing:
        return {n.layer: f"no LayerNorm has its epsilon {n.epsilon:.4g}" for n in missing}
    return {"head": f"a LayerNorm more than in the reference, of epsilon {left[0]:.4g}"}


def _same_epsilon(epsilon: float, norm: Norm) -> bool:
    return bool(np.isclose(epsilon, norm.epsilon, rtol=EPSILON_TOLERANCE, atol=0))


class _Ticker:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def run_samples(
    runtime: Runtime,
    reference: Reference,
    tick: Callable[[], None] = lambda: None,
    indices: Sequence[int] | None = None,
) -> Values:
    """Run samples, all if none are named; outputs (samples, …) and tap sketches (samples, K)."""
    outputs: dict[str, list[np.ndarray]] = {}
    taps: dict[str, list[np.ndarray]] = {}
    for index in range(reference.samples) if indices is None else indices:
        result = runtime.run(reference.sample(index), partial(_sketch, reference))
        for name, value in result.outputs.items():
            outputs.setdefault(name, []).append(value[0] if len(value) == 1 else value)
        for name, value in result.taps.items():
            taps.setdefault(name, []).append(value)
        tick()
    return Values(
        {name: np.stack(values) for name, values in outputs.items()},
        {name: np.stack(values) for name, values in taps.items()},
    )


def _sketch(reference: Reference, tap: str, value: np.ndarray) -> np.ndarray:
    try:
        return reference.sketch(tap, value)
    except (IndexError, KeyError) as error:
        raise ParityError(
            f"the artifact's taps do not fit the reference ({error}): it was made for another "
            "architecture or image size. Make one with `dinoexport reference`."
        ) from error


def budget_of(task: Task, recipe: Recipe) -> float:
    """Return the largest error that a recipe may have, in ``task.error_unit``.

    A mixture has the budget of its coarsest part.
    """
    return max(getattr(task.budgets, _held_as(precision)) for precision in recipe.precisions)


def _held_as(precision: Precision) -> str:
    """Return the field of ``Budgets`` that a precision falls under."""
    if precision.is_float:
        return f"float{precision.bits}"
    if precision.activations is Activations.INT8:
        return "static8"
    if precision.activations is Activations.INT8_DYNAMIC:
        return "dynamic8"
    return f"weights{precision.bits}"


def judge_outputs(
    actual: Values, wanted: Values, task: Task, recipe: Recipe
) -> dict[str, OutputParity]:
    """Compare each output with the task's budget for a recipe."""
    budget = budget_of(task, recipe)
    result = {}
    for name, expected in wanted.outputs.items():
        error = max_error(expected, actual.outputs[name], task.error)
        result[name] = OutputParity(
            unit=task.error_unit,
            max_error=float(f"{error:.4g}"),
            budget=budget,
            sqnr_db=round(sqnr_db(expected, actual.outputs[name]), 1),
            passed=error <= budget,
        )
    return result


def _check_names(
    actual: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], kind: str, path: Path
) -> None:
    if actual.keys() == wanted.keys():
        return
    odd = sorted(actual.keys() ^ wanted.keys())
    raise ParityError(
        f"{path.name}: {kind} '{odd[0]}' is only in one of artifact and reference. "
        "Make the reference from the checkpoint that the artifact was built from."
    )
