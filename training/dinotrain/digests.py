"""Digests of files: what ties artifacts, references, caches and fingerprints to their bytes."""

import hashlib
from pathlib import Path


def digest(path: Path) -> str:
    """sha256 of a file, as hex; it is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
