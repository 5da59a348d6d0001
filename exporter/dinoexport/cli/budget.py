"""``build --precision auto``: search each target for a recipe within a budget, and build it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from dinoexport.cli.output import FAILED, check_folder, print_json
from dinotrain.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from dinoexport.manifest import BudgetRecord
    from dinoexport.plan import BuildRequest
    from dinoexport.search.search import SearchResult
    from dinotrain.tasks.base import Task

AUTO = "auto"


def build_by_budget(
    request: "BuildRequest",
    drops: Mapping[str, float | None],
    prefer: str,
    held_out: int,
    dry_run: bool,
    json: bool,
) -> None:
    """Search, print and draw the fronts, build what was chosen.

    Args:
        request: of the build; its precision is not looked at.
        drops: {option: budget or None}.
        prefer: size or speed.
        held_out: samples that recipes are judged on.
        dry_run: only say what would be searched.
        json: print one JSON object.

    Raises:
        UsageError: no budget, one of another task, or an unknown preference.
        Exit: status 1, a target has nothing within the budget, or a verdict failed.
    """
    import dataclasses

    from dinoexport.plan import plan_build
    from dinotrain.tasks import get_task

    task = get_task(request.task)
    if prefer not in ("size", "speed"):
        raise unknown_name("preference", prefer, ["size", "speed"])
    budget = _budget_of(task.name, task.drop_option, drops)
    plan = plan_build(dataclasses.replace(request, precision="fp16"))
    check_folder(request.out)
    if dry_run:
        _print_search(plan, budget, task.drop_unit, prefer, json)
        return
    from dinoexport.bundle import lock_output
    from dinoexport.console import Reporter
    from dinoexport.pipeline import LOG, build
    from dinoexport.search.search import Search, SearchRequest

    reporter = Reporter()
    wanted = SearchRequest(budget, prefer, held_out)  # type: ignore[arg-type]
    with lock_output(request.out):
        search = Search(plan, wanted, reporter, request.out / LOG)
        results = [search.run(target) for target in plan.targets]
    del search
    for result in results:
        _show(result, plan, budget, task.drop_unit, json)
    bundles = []
    for result in results:
        if result.chosen is not None:
            chosen = dataclasses.replace(
                request,
                precision=result.chosen.recipe,
                target=result.target,
                budget=_record(result, task, budget),
            )
            bundles += build(chosen, reporter).bundles
    _report(results, bundles, budget, json)
    if len(bundles) < len(results) or not all(b.verdict.passed for b in bundles):
        raise typer.Exit(FAILED)


def _record(result: "SearchResult", task: "Task", budget: float) -> "BudgetRecord | None":
    """What the bundle says of the budget that its artifact was chosen for."""
    from dinoexport.manifest import BudgetRecord

    if result.chosen is None:
        return None
    return BudgetRecord(
        option=task.drop_option,
        unit=task.drop_unit,
        allowed=budget,
        measured=result.chosen.error,
        samples=len(result.held_out.samples),
        source=result.held_out.source,
        pixels_sha256=result.held_out.sha256,
        artifact_sha256=result.chosen.sha256,
        passed=result.chosen.error <= budget,
    )


def _budget_of(task: str, option: str, drops: Mapping[str, float | None]) -> float:
    odd = next((n for n, value in drops.items() if value is not None and n != option), None)
    if odd is not None:
        raise UsageError(f"--{odd} is not a budget of task {task}. Use --{option}.")
    budget = drops[option]
    if budget is None:
        raise UsageError(
            f"--precision auto needs a budget. Say how much may be lost: --{option}, such as "
            f"--{option} {_USUAL[option]}."
        )
    return budget


_USUAL = {"max-error-mm": "0.1", "max-top1-drop": "0.01", "max-miou-drop": "0.01"}


def _print_search(plan: Any, budget: float, unit: str, prefer: str, json: bool) -> None:
    facts = {
        "checkpoint": str(plan.checkpoint),
        "targets": list(plan.targets),
        "budget": budget,
        "unit": unit,
        "prefer": prefer,
    }
    if json:
        print_json({"dry_run": True} | facts)
        return
    for key, value in facts.items():
        typer.echo(f"{key:11} {', '.join(value) if isinstance(value, list) else value}")
    typer.echo("nothing was searched or written (--dry-run)")


def _show(result: "SearchResult", plan: Any, budget: float, unit: str, json: bool) -> None:
    """Draw a front into the output folder, and print it."""
    from dinoexport.search.front import draw_front, front_table

    path = plan.request.out / f"{plan.stem}-{result.target}-front.svg"
    title = f"{plan.stem} for {result.target}"
    if result.candidates:
        path.write_bytes(draw_front(result.candidates, budget, unit, result.chosen, title))
    if json:
        return
    where = f"; {path}" if result.candidates else ""
    typer.echo(f"{result.target}: {len(result.candidates)} artifacts on {result.judged_on}{where}")
    for line in front_table(result.candidates, budget, unit, result.chosen):
        typer.echo(line)
    reasons: dict[str, list[str]] = {}
    for recipe, why in (result.refused | result.skipped).items():
        reasons.setdefault(why, []).append(recipe)
    for why, recipes in reasons.items():
        typer.echo(f"    not built: {', '.join(recipes)}: {why}")
    if not result.candidates:
        typer.echo("    nothing could be built")
    elif result.chosen is None:
        least = min(result.candidates, key=lambda c: c.error)
        typer.echo(
            f"    nothing holds {budget:g} {unit}: the least error is {least.error:.3g}, of "
            f"{least.recipe}. Allow more, or build fp32."
        )


def _report(results: "list[SearchResult]", bundles: Any, budget: float, json: bool) -> None:
    from dinoexport.cli.building import print_bundles

    searches = {
        result.target: {
            "budget": budget,
            "judged_on": result.judged_on,
            "chosen": result.chosen.recipe if result.chosen else None,
            "candidates": [
                {f: getattr(c, f) for f in c.__struct_fields__} for c in result.candidates
            ],
            "refused": result.refused,
            "skipped": result.skipped,
        }
        for result in results
    }
    print_bundles(bundles, json, {"search": searches})
