"""How ``train --dry-run`` prints what a run would do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from dinoexport.cli.data_summary import summary_table
from dinoexport.cli.output import one_line, print_json

if TYPE_CHECKING:
    from dinotrain.train_config import TrainConfig

_SHOWN = ("mode", "head", "features", "encoding", "loss", "optimizer", "lr", "schedule")


def print_plan(config: "TrainConfig", as_json: bool) -> None:
    """Print what a run would do; nothing is trained or written.

    Args:
        config: of the run.
        as_json: whether one JSON object is wanted.
    """
    from dinoexport.console import Reporter
    from dinotrain.data.summary import Summary
    from dinotrain.dry_run import describe_run

    with Reporter().tracker() as track:
        plan = describe_run(config, track)
    if as_json:
        print_json(plan)
        return
    summary = msgspec.convert(plan["data"], Summary)
    for line in summary_table(summary):
        typer.echo(line)
    for note in summary.notes:
        _say("note", note)
    for text in summary.skipped:
        _say("left out", text)
    _print_shapes(plan["shapes"])
    counts = plan["parameters"]
    _say("parameters", f"{counts['whole']:,}, of which {counts['trained']:,} train")
    for part, found in counts["parts"].items():
        _say("", f"{part} {found['whole']:,}, {found['trained']:,} train")
    steps = plan["steps"]
    _say(
        "steps",
        f"{steps['steps_per_epoch']} per epoch, batches {steps['batches_per_epoch']}, epochs at "
        f"most {steps['epochs']}",
    )
    cache = plan["cache"]
    if cache is not None:
        _say(
            "features",
            f"{cache['entries']} entries, about {_size(cache['bytes'])}, of which "
            f"{cache['present']} are there, in {cache['folder']}",
        )
    for name in _SHOWN:
        _say(name, _plain(plan["recipe"][name]))
    for entry in plan["writes"]:
        again = ", in the place of the old one" if entry["replaces"] else ""
        _say("would write", f"{entry['path']}: {entry['what']}{again}")


def _print_shapes(shapes: dict[str, Any]) -> None:
    for name, shape in shapes["inputs"].items():
        _say("input", f"{name} {_times(shape)}")
    for name, shape in shapes["features"].items():
        _say("features", f"{name} {_times(shape)}")
    for shape in shapes["pooled"]:
        _say("pooled", _times(shape))
    _say("logits", _times(shapes["logits"]))
    for spec in shapes["outputs"]:
        _say("output", f"{spec['name']} {_times(spec['shape'])} {spec['dtype']}, {spec['unit']}")


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _plain(value: Any) -> str:
    """Write a choice on one line: its kind, then the plain numbers and words about it."""
    if not isinstance(value, dict):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    rest = [
        f"{name.replace('_', ' ')} {_plain(item)}"
        for name, item in value.items()
        if name != "kind" and not isinstance(item, dict) and item not in ((), [])
    ]
    return ", ".join([str(value["kind"]), *rest])


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _say(label: str, text: str) -> None:
    typer.echo(f"{label:12} {one_line(text)}")
