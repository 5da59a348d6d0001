"""The report that stands beside an artifact: what it gives, how it was checked, and what with."""

from dinoexport.manifest import Manifest, Verdict


def _similarity(verdict: Verdict) -> list[str]:
    similarity = verdict.similarity
    if similarity is None:
        return []
    return [
        f"Similarity as shipped: least cosine {similarity.worst_cosine:g} at "
        f"`{similarity.worst_tap}`, at least {similarity.threshold:g} wanted: "
        f"{'pass' if similarity.passed else 'FAIL'}.",
        "",
    ]


def _on(samples: int | None) -> str:
    return "" if samples is None else f"; {samples} of the samples"


def render_report(manifest: Manifest) -> str:
    """Render a manifest as Markdown, the same text for the same manifest."""
    verdict = manifest.parity
    lines = [
        f"# {manifest.name} · {manifest.target}",
        "",
        f"Parity: **{'passed' if verdict.passed else 'FAILED'}**",
        "",
    ]
    if manifest.notice:
        lines += [f"> {manifest.notice}", ""]
    lines += [
        "## Outputs",
        "",
        "| output | unit | largest error | budget | SQNR dB | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {o.unit} | {o.max_error:.2g} | {o.budget:g} | {o.sqnr_db:g} | "
        f"{'pass' if o.passed else 'FAIL'} |"
        for name, o in verdict.outputs.items()
    ]
    structure = verdict.structure
    lines += [
        "",
        f"Run by {verdict.runtime}, on {verdict.reference.samples} samples (photographs and "
        "rendered images).",
        f"Reference: PyTorch float32 on {verdict.reference.device}.",
        "",
        "## Taps",
        "",
        f"Structure ({structure.runtime}{_on(structure.samples)}): "
        f"worst {structure.worst_db:g} dB at `{structure.worst_tap}`, "
        f"at least {structure.threshold_db:g} dB wanted: "
        f"{'pass' if structure.passed else 'FAIL'}.",
        "",
        *_similarity(verdict),
        "| tap | structure dB | as shipped dB | cosine as shipped |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {tap.structure_db:g} | {tap.precision_db:g} | {tap.cosine:g} |"
        for name, tap in verdict.taps.items()
    ]
    if manifest.calibration:
        chosen = manifest.calibration
        lines += [
            "",
            f"Ranges of activations ({chosen.observer}): {chosen.count} samples, {chosen.source}, "
            f"seed {chosen.seed}, pixels `{chosen.sha256}`; `calibration.json` has them.",
        ]
    if manifest.budget:
        kept = manifest.budget
        lines += [
            "",
            f"Budget (`--{kept.option}`): {kept.measured:.3g} {kept.unit} of {kept.allowed:g} "
            f"allowed, on {kept.samples} held-out samples, {kept.source}, pixels "
            f"`{kept.pixels_sha256}`: {'held' if kept.passed else 'NOT HELD'}.",
        ]
    if verdict.blame:
        lines += ["", f"Blame: {verdict.blame.message}."]
    lines += [
        "",
        "## Use",
        "",
        f"The app does: {manifest.preprocessing.app}.",
        "",
        f"The model does: {manifest.preprocessing.model}.",
        "",
        f"Checkpoint: `{manifest.checkpoint.name}` (sha256 `{manifest.checkpoint.sha256}`), "
        f"trained on {manifest.checkpoint.trained_on or 'data that it does not name'}. "
        f"Licence: {manifest.licence}.",
        "",
        "Tools: " + ", ".join(f"{k} {v}" for k, v in manifest.tools.items()) + ".",
        "",
    ]
    return "\n".join(lines)
