"""``python -m dinoexport`` is the ``dinoexport`` command."""

from dinoexport.cli import main

main()
