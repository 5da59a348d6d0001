"""Memory of a build: given back between its steps, and used again within forward passes."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_GLIBC_TRIMS, _GLIBC_MAPS = 2**17, 2**16
_NEVER = 2**31 - 1


@contextmanager
def reusing_freed() -> Iterator[None]:
    """Let forward passes of torch use freed blocks again, large ones too.

    Linux hands out pages one by one, which costs more than the arithmetic on them (40 % of a ViT-B
    at 518 whose attention is written out). What such passes keep should be allocated before them,
    or be small: between large blocks it makes holes that no later block fits into.
    """
    _ask_glibc("mallopt", _MMAP_MAX, 0)
    _ask_glibc("mallopt", _TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _ask_glibc("mallopt", _MMAP_MAX, _GLIBC_MAPS)
        _ask_glibc("mallopt", _TRIM_THRESHOLD, _GLIBC_TRIMS)
        release()


def release() -> None:
    """Collect what nothing refers to, and give it back: glibc keeps freed weights for itself."""
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
