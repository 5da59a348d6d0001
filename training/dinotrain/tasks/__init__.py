"""Tasks: what is measured, from which images, in which units. One file and one line add one."""

from importlib import import_module

from dinotrain.errors import unknown_name
from dinotrain.tasks.base import Task

TABLE = {
    "eyelid": "dinotrain.tasks.eyelid:EyelidTask",
    "classify": "dinotrain.tasks.classify:ClassifyTask",
    "segment": "dinotrain.tasks.segment:SegmentTask",
}
"""Task name → class, imported when it is asked for."""


def get_task(name: str) -> Task:
    """Return the task of a name, or UsageError with the nearest known one."""
    if name not in TABLE:
        raise unknown_name("task", name, TABLE)
    module, cls = TABLE[name].split(":")
    return getattr(import_module(module), cls)()
