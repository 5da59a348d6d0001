"""The report beside an artifact: it says what the manifest says."""

import msgspec

from dinoexport.manifest import Manifest
from dinoexport.report import render_report


def test_the_budget_of_a_search_is_stated(manifest: Manifest) -> None:
    text = render_report(manifest)
    assert "Budget (`--max-error-mm`): 0.0625 mm of 0.1 allowed, on 16 held-out samples" in text
    assert f"eyes.csv, test split, pixels `{'2' * 64}`: held." in text
    assert "Budget" not in render_report(msgspec.structs.replace(manifest, budget=None))


def test_the_samples_of_the_structural_gate_are_said(manifest: Manifest) -> None:
    assert "2 of the samples" not in render_report(manifest)
    structure = msgspec.structs.replace(manifest.parity.structure, samples=2)
    parity = msgspec.structs.replace(manifest.parity, structure=structure)
    assert "; 2 of the samples): worst" in render_report(
        msgspec.structs.replace(manifest, parity=parity)
    )


def test_a_budget_that_was_missed_is_said(manifest: Manifest) -> None:
    missed = msgspec.structs.replace(manifest.budget, measured=0.2, passed=False)
    text = render_report(msgspec.structs.replace(manifest, budget=missed))
    assert "0.2 mm of 0.1 allowed" in text
    assert text.count("NOT HELD") == 1
