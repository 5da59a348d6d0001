"""Telling weight files apart by their first bytes."""

import pytest
import torch
from safetensors.torch import save_file

from dinotrain.backbones.weight_files import open_weights


@pytest.mark.parametrize("extra", range(0, 256, 8))
def test_safetensors_are_told_whatever_the_length_of_their_header(extra, tmp_path):
    # The first byte is the header's length mod 256; 0x80 is also how a pickle begins.
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"note": "x" * extra})
    contents = open_weights(path)

    assert contents.metadata == {"note": "x" * extra}
    assert torch.equal(contents.loaded["a"], torch.ones(2))


def test_the_lengths_above_reach_a_pickles_first_byte(tmp_path):
    path = tmp_path / "x.safetensors"
    first = set()
    for extra in range(0, 256, 8):
        save_file({"a": torch.ones(2)}, path, metadata={"note": "x" * extra})
        first.add(path.read_bytes()[0])

    assert 0x80 in first


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3])
def test_pickles_are_told(zipped, protocol, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(
        {"a": torch.ones(2)},
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )

    assert torch.equal(open_weights(path).loaded["a"], torch.ones(2))
