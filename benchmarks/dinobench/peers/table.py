"""The tables of one run as Markdown, the same text for the same report."""

from dinobench.peers.result import GoalResult, PeersReport, Row, SizeResult

KINDS_SHOWN = 7


def render(report: PeersReport) -> str:
    """Render everything: per size the goals, the candidates, and where their time goes."""
    parts = [line for size in report.sizes for line in _size(size)]
    machine = report.machine
    versions = ", ".join(f"{name} {found}" for name, found in report.versions.items())
    parts += [
        f"Host figures, which say nothing about phones: {machine.processor}, {machine.cores} "
        f"cores, {machine.system}, Python {machine.python}; {versions}.",
    ]
    if report.note:
        parts += ["", f"Note: {report.note}."]
    return "\n".join(parts) + "\n"


def _size(result: SizeResult) -> list[str]:
    weights = "random weights with outlier channels" if result.hot else "random weights"
    lines = [
        f"## {result.size}×{result.size}, {weights}",
        "",
        f"One thread, medians of {result.runs} interleaved runs, prepared pixels to probabilities; "
        f"{result.gflop:.1f} GFLOP of matrix products.",
        "",
        "| ratio | measured (95 %) | to reach | |",
        "|---|--:|--:|---|",
    ]
    lines += [_goal(goal) for goal in result.goals]
    lines += [f"| {what} | – | | a side is missing |" for what in result.missing]
    lines += [
        "",
        "| candidate | how | MB | ms | CPU ms | ÷ products | worst error | SQNR dB | |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [_row(row) for row in result.rows]
    profiled = [row for row in result.rows if row.profile]
    if profiled:
        lines += ["", "Where the time goes, ms per run:", ""]
        lines += [_profile(row) for row in profiled]
    return [*lines, ""]


def _goal(goal: GoalResult) -> str:
    found = goal.ratio
    limit = "" if goal.limit is None else f"≤ {goal.limit:.2f}"
    verdict = {True: "reached", False: "NOT REACHED", None: ""}[goal.reached]
    return (
        f"| {goal.what} ({goal.above} ÷ {goal.below}) | {found.value:.2f} "
        f"({found.low:.2f}–{found.high:.2f}) | {limit} | {verdict} |"
    )


def _row(row: Row) -> str:
    if row.skipped:
        reason = row.skipped.replace("|", "\\|")
        return f"| {row.name} | {row.what} | | | | | | | skipped: {reason} |"
    worst = "" if row.worst is None else f"{row.worst:.1e}"
    sqnr = "" if row.sqnr_db is None else f"{row.sqnr_db:.0f}"
    return (
        f"| {row.name} | {row.what} | {row.size_mb:.1f} | {row.wall_ms:.1f} | {row.cpu_ms:.1f} | "
        f"{row.of_roofline:.2f} | {worst} | {sqnr} | {row.note} |"
    )


def _profile(row: Row) -> str:
    shown = [
        f"{t.kind}{f' ×{t.count}' if t.count else ''} {t.ms:.1f}" for t in row.profile[:KINDS_SHOWN]
    ]
    rest = sum(t.ms for t in row.profile[KINDS_SHOWN:])
    if rest:
        shown.append(f"others {rest:.1f}")
    return f"- {row.name}: {', '.join(shown)}"
