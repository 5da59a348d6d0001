"""What benchmarks write: versioned structures, and the Markdown that shows them."""

from typing import Any

import msgspec

from dinobench.machine import Machine

SCHEMA_VERSION = 1


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One bundle that a build gave."""

    target: str
    size_mb: float
    passed: bool
    worst_error: float
    """Largest error of any output against the reference, in ``unit``."""
    unit: str
    structure_db: float
    """SQNR of the worst tap in exact arithmetic."""


class BuildCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ``dinoexport build``: what it cost, and what it gave or why it gave nothing."""

    model: str
    target: str
    precision: str
    wall_s: float
    peak_gb: float
    """Of the largest process."""
    artifacts: tuple[Artifact, ...] = ()
    error: str = ""

    @property
    def passed(self) -> bool:
        """True if it gave artifacts and each passed parity."""
        return not self.error and bool(self.artifacts) and all(a.passed for a in self.artifacts)


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the builds of one model may cost, each."""

    model: str
    what: str
    wall_s: float
    peak_gb: float


class LimitResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A limit, beside the slowest and the largest build that it judges."""

    limit: Limit
    wall_s: float
    peak_gb: float
    holds: bool


class BuildCostReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one run of ``dinobench.build_cost`` found."""

    schema: str = "dinobench.build_cost"
    schema_version: int = SCHEMA_VERSION
    machine: Machine
    note: str = ""
    builds: tuple[BuildCost, ...]
    limits: tuple[LimitResult, ...]
    passed: bool


def read_build(
    model: str, target: str, precision: str, status: int, stdout: str, cost: tuple[float, float]
) -> BuildCost:
    """Read what ``dinoexport build --json`` printed.

    Args:
        model: name for the table.
        target: as asked for.
        precision: as asked for.
        status: exit status, of which 0 and 1 come with bundles.
        stdout: one JSON object.
        cost: wall time in seconds, peak memory in GB.
    """
    wall_s, peak_gb = round(cost[0], 1), round(cost[1], 2)
    facts: dict[str, Any] = {}
    error = ""
    try:
        facts = msgspec.json.decode(stdout, type=dict[str, Any])
        artifacts = tuple(_read_artifact(bundle) for bundle in facts.get("bundles", ()))
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError) as problem:
        artifacts, error = (), f"its output cannot be read: {problem}"
    if status not in (0, 1) or not artifacts:
        error = str(facts.get("error") or error or "it gave no bundle") + f" (status {status})"
    return BuildCost(
        model=model,
        target=target,
        precision=precision,
        wall_s=wall_s,
        peak_gb=peak_gb,
        artifacts=artifacts,
        error=error,
    )


def judge(limits: tuple[Limit, ...], builds: tuple[BuildCost, ...]) -> tuple[LimitResult, ...]:
    """Hold the builds of each limit's model against it; a failed build breaks its limit."""
    results = []
    for limit in limits:
        own = [build for build in builds if build.model == limit.model]
        if not own:
            continue
        wall_s = max(build.wall_s for build in own)
        peak_gb = max(build.peak_gb for build in own)
        results.append(
            LimitResult(
                limit=limit,
                wall_s=wall_s,
                peak_gb=peak_gb,
                holds=wall_s < limit.wall_s
                and peak_gb < limit.peak_gb
                and all(build.passed for build in own),
            )
        )
    return tuple(results)


def render_build_cost(report: BuildCostReport) -> str:
    """Render as Markdown, the same text for the same report."""
    lines = [
        "| model | target | precision | wall s | peak GB | artifact MB | verdict | "
        "worst error | worst structure dB |",
        "|---|---|---|--:|--:|--:|---|--:|--:|",
    ]
    for build in report.builds:
        lines += _rows(build)
    lines += ["", *(_line(result) for result in report.limits), "", _origin(report.machine)]
    if report.note:
        lines += ["", f"Note: {report.note}."]
    return "\n".join(lines) + "\n"


def _read_artifact(bundle: dict[str, Any]) -> Artifact:
    outputs = bundle["parity"]["outputs"].values()
    worst = max(outputs, key=lambda output: output["max_error"])
    return Artifact(
        target=bundle["target"],
        size_mb=round(bundle["size_bytes"] / 1e6, 2),
        passed=bundle["passed"],
        worst_error=worst["max_error"],
        unit=worst["unit"],
        structure_db=bundle["parity"]["structure"]["worst_db"],
    )


def _rows(build: BuildCost) -> list[str]:
    cost = f"{build.wall_s:.1f} | {build.peak_gb:.2f}"
    if build.error:
        error = build.error.replace("|", "\\|")
        return [f"| {build.model} | {build.target} | {build.precision} | {cost} | | {error} | | |"]
    rows = []
    # One process that built several targets has one cost; it stands in a row of its own.
    if len(build.artifacts) > 1:
        verdict = _verdict(build.passed)
        rows.append(
            f"| {build.model} | {build.target} | {build.precision} | {cost} | | {verdict} | | |"
        )
        cost = " | "
    for artifact in build.artifacts:
        rows.append(
            f"| {build.model} | {artifact.target} | {build.precision} | {cost} | "
            f"{artifact.size_mb:.1f} | {_verdict(artifact.passed)} | "
            f"{artifact.worst_error:.2g} {artifact.unit} | {artifact.structure_db:g} |"
        )
    return rows


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _line(result: LimitResult) -> str:
    limit = result.limit
    return (
        f"- {limit.model}, {limit.what}: {result.wall_s:.1f} s of {limit.wall_s:g} allowed, "
        f"{result.peak_gb:.2f} GB of {limit.peak_gb:g}: {'holds' if result.holds else 'BROKEN'}"
    )


def _origin(machine: Machine) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in machine.versions.items())
    return (
        f"Taken on {machine.processor}, {machine.cores} cores, {machine.memory_gb:g} GB, "
        f"{machine.system}, Python {machine.python}; {versions}. One build is one process that "
        "starts cold and includes its reference and its verdict; peak is of its largest process."
    )
