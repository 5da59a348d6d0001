"""A study of four short runs on the tiny eyes, in the shape of the real ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from dinotrain.encoding import Encoding
from dinotrain.heads.branch import HeadConfig
from dinotrain.study.plan import Study, StudyRequest
from dinotrain.study.runs import run_study
from dinotrain.study.tables import StudyResult

TINY = Study(
    name="tiny",
    title="A tiny study",
    text="What a study does, on bars.",
    claim="Nobody claims anything.",
    backbone="none",
    shared={"head": HeadConfig(hidden=16), "batch_size": 8},
    groups={
        "numbers": {"MSE": {"encoding": Encoding(kind="scalar"), "orthogonality": "none"}},
        "bits": {"focal, γ = 4": {"loss": "focal", "gamma": 4.0}},
    },
    against="study",
)


@contextmanager
def single_thread() -> Iterator[None]:
    """Runs are compared to the last bit, which more threads would change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study-cache")


@pytest.fixture(scope="session")
def request_in(tiny_eyes, tiny_backbone, feature_cache) -> Callable[..., StudyRequest]:
    """Give a request for the tiny study in a folder, some fields changed."""

    def make(out: Path, **changes) -> StudyRequest:
        request = StudyRequest(
            study=TINY,
            backbone=str(tiny_backbone),
            out=out,
            data=tiny_eyes,
            seeds=2,
            epochs=2,
            image_size=(28, 28),
            device="cpu",
            cache=feature_cache,
        )
        return msgspec.structs.replace(request, **changes)

    return make


@pytest.fixture(scope="session")
def finished(request_in, tmp_path_factory) -> StudyResult:
    """The tiny study, run once without a break; do not change its folder."""
    with single_thread():
        return run_study(request_in(tmp_path_factory.mktemp("study")))
