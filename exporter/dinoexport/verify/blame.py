"""Name the first layer at which an artifact leaves its reference."""

import dataclasses
from collections.abc import Mapping, Sequence

from dinoexport.manifest import Blame, OutputParity, Similarity, TapParity
from dinoexport.recipes import PRECISIONS, Recipe

NOTABLE_DROP_DB = 3.0
_HEAD = {
    "structure": "the fault is in the head or the decoder",
    "precision": "the head enlarges what the shipped precision rounds. ",
}


def blame_structure(
    taps: Mapping[str, TapParity],
    outputs: Mapping[str, OutputParity],
    threshold_db: float,
    gelu_forms: Sequence[str] = ("exact",),
    wrong_norms: Mapping[str, str] | None = None,
) -> Blame:
    """Blame the first tap below the threshold, else the head and decoder behind the last tap.

    Args:
        taps: in the order of the graph.
        outputs: of the run in exact arithmetic.
        threshold_db: of the structural gate.
        gelu_forms: that the artifact computes; DINOv2 has the exact one.
        wrong_norms: {layer: what is wrong with its LayerNorm}.
    """
    wrong_norms = wrong_norms or {}
    form = next((form for form in gelu_forms if form != "exact"), None)
    gelu = f"the artifact computes the {form} form of GELU, DINOv2 has the exact one"
    previous, previous_db = "input", 200.0

    def found(layer: str, message: str) -> Blame:
        return Blame(
            gate="structure",
            layer=layer,
            sqnr_db=taps[layer].structure_db if layer in taps else previous_db,
            previous_layer=previous,
            previous_db=previous_db,
            message=message,
        )

    for name, tap in taps.items():
        if name in wrong_norms:
            return found(name, f"{name}: {wrong_norms[name]}")
        if tap.structure_db < threshold_db:
            return found(
                name,
                f"the artifact leaves the reference at {name}: {tap.structure_db:g} dB, where "
                f"{previous} still had {previous_db:g} dB and {threshold_db:g} dB are wanted"
                + (f"; {gelu}" if form else ""),
            )
        previous, previous_db = name, tap.structure_db
    for name, text in wrong_norms.items():
        return found(name, f"{name}: {text}")
    if form:
        return found("gelu", gelu)
    return _blame_head("structure", previous, previous_db, outputs)


def blame_outputs(
    taps: Mapping[str, TapParity], outputs: Mapping[str, OutputParity], recipe: Recipe
) -> Blame:
    """Blame the tap at which the shipped precision loses most, else the head and decoder.

    Args:
        taps: in the order of the graph.
        outputs: of the artifact as it is shipped.
        recipe: what was built, so that the next step can be named.
    """
    previous, previous_db = "input", 200.0
    worst: Blame | None = None
    largest = NOTABLE_DROP_DB
    for name, tap in taps.items():
        drop = previous_db - tap.precision_db
        if previous != "input" and drop > largest:
            largest = drop
            worst = Blame(
                gate="precision",
                layer=name,
                sqnr_db=tap.precision_db,
                previous_layer=previous,
                previous_db=previous_db,
                message=(
                    f"the shipped precision loses most at {name}: from {previous_db:g} to "
                    f"{tap.precision_db:g} dB. {_next_step(recipe, name)}"
                ),
            )
        previous, previous_db = name, tap.precision_db
    if worst:
        return worst
    step = _next_step(recipe, "head")
    return _blame_head("precision", previous, previous_db, outputs, step)


def blame_similarity(
    taps: Mapping[str, TapParity], similarity: Similarity, recipe: Recipe
) -> Blame:
    """Blame the first tap whose angle is too wide."""
    previous, previous_db = "input", 200.0
    for name, tap in taps.items():
        if tap.cosine < similarity.threshold:
            break
        previous, previous_db = name, tap.precision_db
    else:
        name, tap = similarity.worst_tap, taps[similarity.worst_tap]
    return Blame(
        gate="similarity",
        layer=name,
        sqnr_db=tap.precision_db,
        previous_layer=previous,
        previous_db=previous_db,
        message=(
            f"{name} turns away from float32: cosine {tap.cosine:g}, where "
            f"{similarity.threshold:g} is wanted. {_next_step(recipe, name)}"
        ),
    )


def _next_step(recipe: Recipe, tap: str) -> str:
    """Name a recipe that loses less at a tap."""
    if recipe.is_float:
        return "Build with --precision fp32"
    place = {"tokens": "patch_embed", "features": "head", "logits": "head"}.get(tap, tap)
    finer = dataclasses.replace(recipe, changes=(*recipe.changes, (place, PRECISIONS["fp16"])))
    return f"Build with --precision {finer.name}, or let --precision auto choose"


def _blame_head(
    gate: str,
    previous: str,
    previous_db: float,
    outputs: Mapping[str, OutputParity],
    step: str = "",
) -> Blame:
    name, worst = max(outputs.items(), key=lambda item: item[1].max_error / item[1].budget)
    return Blame(
        gate=gate,
        layer="head",
        sqnr_db=worst.sqnr_db,
        previous_layer=previous,
        previous_db=previous_db,
        message=(
            f"all taps hold, and {name} is off by {worst.max_error:g} {worst.unit} where "
            f"{worst.budget:g} is allowed: {_HEAD[gate]}{step}"
        ),
    )
