"""Commands about the installation: list, doctor."""

from typing import Annotated

import typer

from dinoexport.cli.app import Json, app
from dinoexport.cli.output import FAILED, print_json
from dinoexport.recipes import MODIFIERS


@app.command("list")
def list_names(
    kind: Annotated[
        str, typer.Argument(metavar="[KIND]", help="tasks, backbones, targets, recipes.")
    ] = "",
    json: Json = False,
) -> None:
    """List tasks, backbones, targets and recipes; `list recipes` says where each runs and pays."""
    from dinoexport.catalogue import catalogue, recipe_table
    from dinotrain.errors import unknown_name

    if kind == "recipes":
        _list_recipes(recipe_table(), json)
        return
    facts = catalogue()
    if kind and kind not in facts:
        raise unknown_name("kind", kind, facts)
    if kind:
        facts = {kind: facts[kind]}
    if json:
        print_json(facts)
        return
    for kind, entries in facts.items():
        typer.echo(f"{kind}:")
        for name, text in entries.items():
            typer.echo(f"  {name:22} {text}")


def _list_recipes(table: dict[str, dict[str, str]], json: bool) -> None:
    if json:
        print_json(table)
        return
    for name, row in table.items():
        typer.echo(f"{name}: {row['is']}")
        for target, text in row.items():
            if target != "is":
                typer.echo(f"  {target:10} {text}")
    typer.echo("")
    typer.echo("RECIPE:LAYER=RECIPE,… gives some layers another one: w8a8:blocks.5.mlp=fp16")
    for name, text in MODIFIERS.items():
        typer.echo(f"RECIPE:{name:10} {text}")


@app.command()
def doctor(json: Json = False) -> None:
    """Check this installation: versions, devices, memory, and the embedded checkpoint."""
    from dinoexport.doctor import examine

    checks = examine()
    if json:
        print_json(
            {
                "passed": all(c.passed for c in checks),
                "checks": [{"name": c.name, "passed": c.passed, "found": c.found} for c in checks],
            }
        )
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:22} {check.found}")
    if not all(check.passed for check in checks):
        raise typer.Exit(FAILED)
