"""The typer application that the command modules add themselves to."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="dinoexport",
    help="Frozen-DINOv2 models on phones, with a parity verdict on every build.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
TaskName = Annotated[str, typer.Option("--task", help="What is measured; see `dinoexport list`.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="A trained .safetensors; the embedded one if left out."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size", help="N or HxW pixels, multiples of 14; the trained size if left out."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Frozen-DINOv2 models on phones, with a parity verdict on every build."""
    if version:
        from dinoexport import __version__

        typer.echo(f"dinoexport {__version__}")
        raise typer.Exit
