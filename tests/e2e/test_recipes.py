"""Every recipe on every target that has it: the embedded checkpoint, with its real verdict."""

from pathlib import Path

import pytest

from dinoexport.bundle import open_bundle
from dinoexport.console import Reporter
from dinoexport.manifest import Verdict
from dinoexport.pipeline import build
from dinoexport.plan import BuildRequest, CalibrationRequest
from dinoexport.quantize.calibration import RECORD, read_record
from dinoexport.recipes import PRECISIONS, parse_recipe
from dinoexport.targets.table import TABLE, get_target

QUANTISED = [name for name, precision in PRECISIONS.items() if not precision.is_float]
MIXTURE = "w8a8:smooth,blocks.5.mlp=fp16,head=w8"
FP16_BYTES = 6.5e6
"""Of the embedded checkpoint in each format, within 2 % (README)."""


def targets_of(recipe: str) -> list[str]:
    wanted = parse_recipe(recipe).precisions
    return [name for name in TABLE if all(p.name in get_target(name).supports for p in wanted)]


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", [*QUANTISED, MIXTURE])
def test_recipe_passes_on_each_target(recipe: str, tmp_path: Path) -> None:
    names = targets_of(recipe)
    assert names
    request = BuildRequest(
        task="eyelid",
        target=",".join(names),
        out=tmp_path,
        precision=recipe,
        calibration=CalibrationRequest(count=16),
    )
    result = build(request, Reporter(enabled=False))
    assert [bundle.target for bundle in result.bundles] == names
    for built in result.bundles:
        check_verdict(built.verdict, built.target)
        # Quantised weights are what an artifact mostly is; the mixture keeps a block in half.
        assert built.size_bytes < (0.65 if ":" in recipe else 0.6) * FP16_BYTES, built.target
        bundle = open_bundle(built.path)
        assert bundle.manifest.precision == recipe
        assert bundle.artifact.name.startswith(f"eyelid-vitti14_eyes-224-{recipe}")
        assert get_target(built.target).read_metadata(bundle.artifact)["precision"] == recipe
        if parse_recipe(recipe).calibrated:
            record = read_record(built.path / RECORD)
            assert record.count == bundle.manifest.calibration.count == 16
            assert record.sha256 == bundle.manifest.calibration.sha256
        else:
            assert bundle.manifest.calibration is None


def check_verdict(verdict: Verdict, target: str) -> None:
    """Passed, by every gate; and quantised indeed: float artifacts err by a hundredth of this."""
    assert verdict.passed, (target, verdict.blame)
    assert verdict.structure.worst_db >= 110
    assert verdict.similarity.passed
    assert max(output.max_error for output in verdict.outputs.values()) > 0.005
