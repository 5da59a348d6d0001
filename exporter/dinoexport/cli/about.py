"""Commands about the installation: list, doctor."""

import typer

from dinoexport.cli.app import Json, app
from dinoexport.cli.output import FAILED, print_json


@app.command("list")
def list_names(json: Json = False) -> None:
    """List tasks, backbones and targets."""
    from dinoexport.catalogue import catalogue

    facts = catalogue()
    if json:
        print_json(facts)
        return
    for kind, entries in facts.items():
        typer.echo(f"{kind}:")
        for name, text in entries.items():
            typer.echo(f"  {name:22} {text}")


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
