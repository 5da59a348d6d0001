"""Blame names the first place at which something is wrong, whichever gate saw it."""

import pytest

from dinoexport.manifest import OutputParity, Similarity, TapParity
from dinoexport.recipes import parse_recipe
from dinoexport.verify.blame import (
    NOTABLE_DROP_DB,
    blame_outputs,
    blame_similarity,
    blame_structure,
)

FP16 = parse_recipe("fp16")
NAMES = ("tokens", "blocks.0.attn", "blocks.0.mlp", "features")
THRESHOLD = 110.0


def taps(
    structure: tuple[float, ...] = (130,) * 4,
    precision: tuple[float, ...] = (65,) * 4,
    cosines: tuple[float, ...] = (1,) * 4,
):
    return {
        name: TapParity(structure_db=s, precision_db=p, cosine=c)
        for name, s, p, c in zip(NAMES, structure, precision, cosines, strict=True)
    }


def output(error: float, budget: float = 0.02, sqnr: float = 50.0) -> OutputParity:
    return OutputParity(
        unit="mm", max_error=error, budget=budget, sqnr_db=sqnr, passed=error <= budget
    )


GOOD = {"mrd1_mm": output(0.001), "lf_mm": output(0.002)}


@pytest.mark.parametrize("first", range(4))
def test_the_first_tap_below_the_threshold(first: int) -> None:
    """All behind it are low too, some of them lower."""
    levels = (130.0, 129.0, 128.0, 127.0)[:first] + (95.0, 20.0, 109.9, -200.0)[first:]
    blame = blame_structure(taps(levels), GOOD, THRESHOLD)
    assert (blame.gate, blame.layer, blame.sqnr_db) == ("structure", NAMES[first], levels[first])
    before = ("input", 200.0) if first == 0 else (NAMES[first - 1], levels[first - 1])
    assert (blame.previous_layer, blame.previous_db) == before
    assert NAMES[first] in blame.message
    assert f"{levels[first]:g} dB" in blame.message
    assert "110 dB are wanted" in blame.message
    assert "GELU" not in blame.message


def test_at_the_threshold_a_tap_holds() -> None:
    blame = blame_structure(taps((110.0, 109.9, 130, 130)), GOOD, THRESHOLD)
    assert blame.layer == "blocks.0.attn"


def test_a_wrong_norm_before_the_first_low_tap() -> None:
    low = taps((130, 130, 50, 50))
    norms = {"blocks.0.attn": "LayerNorm has epsilon 1e-5"}
    blame = blame_structure(low, GOOD, THRESHOLD, wrong_norms=norms)
    assert blame.layer == "blocks.0.attn"
    assert blame.message == "blocks.0.attn: LayerNorm has epsilon 1e-5"
    assert (blame.sqnr_db, blame.previous_layer) == (130, "tokens")
    # At the same tap the norm says more than the level.
    same = blame_structure(low, GOOD, THRESHOLD, wrong_norms={"blocks.0.mlp": "epsilon"})
    assert (same.layer, same.message) == ("blocks.0.mlp", "blocks.0.mlp: epsilon")
    # One behind the first low tap is a second fault.
    later = blame_structure(low, GOOD, THRESHOLD, wrong_norms={"features": "epsilon"})
    assert later.layer == "blocks.0.mlp"
    assert "50 dB" in later.message


def test_a_wrong_norm_that_no_tap_sees() -> None:
    for layer in ("features", "head"):
        blame = blame_structure(taps(), GOOD, THRESHOLD, wrong_norms={layer: "epsilon 1"})
        assert blame.layer == layer
        assert blame.message == f"{layer}: epsilon 1"
    assert blame_structure(taps(), GOOD, THRESHOLD, wrong_norms={"head": "x"}).sqnr_db == 130


def test_another_form_of_gelu() -> None:
    alone = blame_structure(taps(), GOOD, THRESHOLD, ("exact", "tanh"))
    assert alone.layer == "gelu"
    assert alone.message.startswith("the artifact computes the tanh form of GELU")
    # With a low tap, the tap is the place and the form the reason.
    both = blame_structure(taps((130, 130, 90, 90)), GOOD, THRESHOLD, ("sigmoid",))
    assert both.layer == "blocks.0.mlp"
    assert "the sigmoid form of GELU" in both.message


def test_the_head_when_all_taps_hold() -> None:
    """The output that is off most, in parts of its budget: not the one with the largest error."""
    outputs = {"a_mm": output(0.5, 1.0), "b_mm": output(0.09, 0.001, 12.5), "c_mm": output(0.0)}
    blame = blame_structure(taps(), outputs, THRESHOLD)
    assert (blame.gate, blame.layer, blame.sqnr_db) == ("structure", "head", 12.5)
    assert (blame.previous_layer, blame.previous_db) == ("features", 130)
    assert "b_mm is off by 0.09 mm where 0.001 is allowed" in blame.message


def test_precision_is_lost_where_the_drop_is_largest() -> None:
    # From the input to the first tap there is no drop: the input has no figure.
    blame = blame_outputs(taps(precision=(75, 70, 40, 38)), GOOD, FP16)
    assert (blame.gate, blame.layer) == ("precision", "blocks.0.mlp")
    assert (blame.previous_layer, blame.previous_db, blame.sqnr_db) == ("blocks.0.attn", 70, 40)
    assert "from 70 to 40 dB" in blame.message
    assert "--precision fp32" in blame.message


def test_small_drops_are_no_reason() -> None:
    drop = NOTABLE_DROP_DB
    even = taps(precision=(75, 75 - drop, 75 - 2 * drop, 75 - 3 * drop))
    blame = blame_outputs(even, {"lf_mm": output(0.05)}, FP16)
    assert (blame.gate, blame.layer) == ("precision", "head")
    assert "lf_mm is off by 0.05 mm where 0.02 is allowed" in blame.message
    steeper = taps(precision=(75, 75 - drop - 0.1, 60, 60))
    assert blame_outputs(steeper, {"lf_mm": output(0.05)}, FP16).layer == "blocks.0.mlp"


def test_a_quantised_recipe_is_told_which_layer_to_keep() -> None:
    recipe = parse_recipe("w8a8:head=fp16")
    blame = blame_outputs(taps(precision=(35, 34, 12, 11)), {"lf_mm": output(0.9)}, recipe)
    assert blame.layer == "blocks.0.mlp"
    assert "--precision w8a8:head=fp16,blocks.0.mlp=fp16" in blame.message
    assert "--precision auto" in blame.message
    even = blame_outputs(taps(), {"lf_mm": output(0.9)}, parse_recipe("w8"))
    assert "--precision w8:head=fp16" in even.message


def test_the_first_tap_that_turns_away_is_blamed() -> None:
    similarity = Similarity(threshold=0.98, worst_tap="features", worst_cosine=0.2, passed=False)
    turned = taps(cosines=(0.999, 0.97, 0.99, 0.2))
    blame = blame_similarity(turned, similarity, parse_recipe("w8a8"))
    assert (blame.gate, blame.layer) == ("similarity", "blocks.0.attn")
    assert (blame.previous_layer, blame.sqnr_db) == ("tokens", 65)
    assert "cosine 0.97, where 0.98 is wanted" in blame.message
    assert "w8a8:blocks.0.attn=fp16" in blame.message
    first = blame_similarity(taps(cosines=(0.5,) * 4), similarity, parse_recipe("w8a8"))
    assert "w8a8:patch_embed=fp16" in first.message
