"""Memory of a build: what each step leaves goes back to the system before the next one.

Within a step, large blocks are mappings of their own, which go back when they are freed. Kept in
glibc's heap, attention maps would spare a third of their time, in page faults; but what is small
and lies between them makes holes that no later map fits into: 14 GB were seen where 4 are enough.
"""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

MAPPED_BYTES = 4 * 2**20
"""Blocks from which on each is a mapping of its own. glibc learns a limit of up to 32 MB, and the
tokens of a picture at 518 px, 13 MB, then leave holes: a third of a build's memory. From 1 MB on,
builds were a few per cent slower, and no smaller than from 4 MB on."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""

WORTH_BYTES = 16 * 2**20
"""Weights from which on a collection pays: beside all that converters load it takes 0.3 s."""


def map_large_blocks() -> None:
    """Let freed blocks above ``MAPPED_BYTES`` go back to the system, in this process."""
    _ask_glibc("mallopt", _M_MMAP_THRESHOLD, MAPPED_BYTES)
    # Set by hand, the one leaves the other at 128 KB: the heap would shrink and grow all the time.
    _ask_glibc("mallopt", _M_TRIM_THRESHOLD, 16 * MAPPED_BYTES)


def release(size_bytes: int) -> None:
    """Collect what nothing refers to, and give it back: glibc keeps freed weights for itself.

    Args:
        size_bytes: of the weights that may be held in vain; nothing is done for few.
    """
    if size_bytes < WORTH_BYTES:
        return
    gc.collect()
    _ask_glibc("malloc_trim", 0)


def free_bytes() -> int | None:
    """Return what the system could still give, swap included; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        return 1024 * (facts["MemAvailable"] + facts["SwapFree"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _ask_glibc(function: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # other libraries have no such function
            getattr(ctypes.CDLL(None), function)(*arguments)
