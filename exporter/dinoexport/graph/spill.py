"""Weights of a captured program in a file: they take no memory while nobody reads them.

Targets read them while they lower. While an artifact is verified they would only lie beside the
copies that its runtime makes.
"""

import dataclasses
import mmap
import tempfile
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoexport.graph.capture import CapturedProgram
from dinoexport.memory import WORTH_BYTES

Place = tuple[int, int]
_LEAST_BYTES = 2**16
"""Of an array that is worth a place of its own."""


def spill_(program: CapturedProgram) -> CapturedProgram:
    """Move the weights of a program, and the codes of its layers, into a temporary file.

    The file has no name and goes with the process. Where it cannot be written, or there is little
    to move, everything stays where it is: that costs memory and no build.

    Args:
        program: its tensors are changed in place.

    Returns:
        The program with the same numbers; its ``rest`` takes their memory back.
    """
    if program.weight_bytes < WORTH_BYTES:
        return program
    with suppress(OSError):
        return _spill_(program)
    return program


def _spill_(program: CapturedProgram) -> CapturedProgram:
    tensors = [(t, _place(t.detach().numpy())) for t in _tensors(program)]
    stored = {name: layer.stored for name, layer in program.layers.items()}
    large = {name: x for name, x in stored.items() if x is not None and _is_large(x.codes)}
    # Both programs have the same weights, which are written once.
    arrays: dict[Place, NDArray[np.generic]] = {p: t.detach().numpy() for t, p in tensors}
    arrays |= {_place(x.codes): x.codes for x in large.values()}
    offsets = {}
    with tempfile.TemporaryFile(prefix="dinoexport-") as file:
        for place, array in arrays.items():
            offsets[place] = file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE)
            file.write(array.data)
        file.flush()
        pages = mmap.mmap(file.fileno(), 0)
    for tensor, place in tensors:
        flat = torch.frombuffer(
            pages, dtype=tensor.dtype, count=tensor.numel(), offset=offsets[place]
        )
        tensor.data = flat.view(tensor.shape)
    layers = dict(program.layers)
    for name, weight in large.items():
        codes = weight.codes
        flat = np.frombuffer(pages, codes.dtype, codes.size, offsets[_place(codes)])
        moved = dataclasses.replace(weight, codes=flat.reshape(codes.shape))
        layers[name] = dataclasses.replace(layers[name], stored=moved)
    return dataclasses.replace(program, layers=layers, pages=pages)


def _tensors(program: CapturedProgram) -> list[Tensor]:
    """Large weights of both programs, each once."""
    both = (program.program, program.debug_program)
    found = {id(t): t for exported in both for t in exported.state_dict.values()}
    return [t for t in found.values() if t.is_contiguous() and t.nbytes >= _LEAST_BYTES]


def _is_large(codes: NDArray[np.generic]) -> bool:
    return codes.flags.c_contiguous and codes.nbytes >= _LEAST_BYTES


def _place(array: NDArray[np.generic]) -> Place:
    """Where numbers lie in memory: what starts at one place may be of two sizes."""
    return array.ctypes.data, array.nbytes
