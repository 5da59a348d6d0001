"""Weights of a captured program in a file: they take no memory while nobody reads them.

Targets read them while they lower. While an artifact is verified they would only lie beside the
copies that its runtime makes.
"""

import dataclasses
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoexport.graph.capture import CapturedProgram
from dinoexport.memory import WORTH_BYTES
from dinoexport.quantize.layers import Layer

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
    tensors = {id(t): t for t in _tensors(program)}.values()
    addresses = [t.data_ptr() for t in tensors]
    stored = {name: layer for name, layer in program.layers.items() if _is_large(layer)}
    # Both programs have the same weights, which are written once.
    arrays: dict[int, NDArray[np.generic]] = {
        address: t.detach().numpy() for address, t in zip(addresses, tensors, strict=True)
    }
    arrays |= {_address(layer): layer.stored.codes for layer in stored.values()}  # type: ignore[union-attr]
    with tempfile.TemporaryFile(prefix="dinoexport-") as file:
        places = {}
        for address, array in arrays.items():
            places[address] = file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE)
            file.write(array.data)
        file.flush()
        pages = mmap.mmap(file.fileno(), 0)
    for tensor, address in zip(tensors, addresses, strict=True):
        flat = torch.frombuffer(
            pages, dtype=tensor.dtype, count=tensor.numel(), offset=places[address]
        )
        tensor.data = flat.view(tensor.shape)
    moved = {name: _with_codes(layer, pages, places) for name, layer in stored.items()}
    return dataclasses.replace(program, layers={**program.layers, **moved}, pages=pages)


def _tensors(program: CapturedProgram) -> Iterator[Tensor]:
    for exported in (program.program, program.debug_program):
        for tensor in exported.state_dict.values():
            if tensor.is_contiguous() and tensor.nbytes >= _LEAST_BYTES:
                yield tensor


def _is_large(layer: Layer) -> bool:
    if layer.stored is None:
        return False
    codes = layer.stored.codes
    return codes.flags.c_contiguous and codes.nbytes >= _LEAST_BYTES


def _address(layer: Layer) -> int:
    return layer.stored.codes.ctypes.data  # type: ignore[union-attr]


def _with_codes(layer: Layer, pages: mmap.mmap, places: dict[int, int]) -> Layer:
    stored = layer.stored
    codes: NDArray[np.generic] = np.frombuffer(
        pages,
        stored.codes.dtype,  # type: ignore[union-attr]
        stored.codes.size,  # type: ignore[union-attr]
        places[_address(layer)],
    ).reshape(stored.codes.shape)  # type: ignore[union-attr]
    return dataclasses.replace(layer, stored=dataclasses.replace(stored, codes=codes))  # type: ignore[type-var]
