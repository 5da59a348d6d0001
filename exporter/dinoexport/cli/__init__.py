"""The ``dinoexport`` command: argument parsing only; each command loads what it needs when called.

Exit status: 0 passed, 1 a gate failed, 2 could not tell (bad input, or nothing to judge).
"""

import sys

# Importing the modules puts their commands on the app; each imports its work inside the function.
from dinoexport.cli import about, building, demo, studying, train, training, using  # noqa: F401
from dinoexport.cli.app import app
from dinoexport.cli.output import run_app


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_app(app))
