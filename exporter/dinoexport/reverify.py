"""The verdict of a bundle once more: by its own reference, or by one made elsewhere."""

import os
from pathlib import Path

from dinoexport.bundle import Bundle, check_files, open_bundle
from dinoexport.console import Reporter, quiet
from dinoexport.errors import ParityError
from dinoexport.manifest import Verdict
from dinoexport.recipes import parse_recipe
from dinoexport.targets.table import get_target
from dinoexport.verify.parity import verify_artifact
from dinoexport.verify.reference import Reference, with_deployed_of
from dinoexport.verify.reference_file import load_reference
from dinotrain.tasks import get_task


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
