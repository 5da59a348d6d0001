"""The section of masks, on rendered metal."""

import numpy as np
import pytest

from dinotrain.data.synthetic.surfaces import CLASSES, render_surface
from dinotrain.errors import DataError, ShapeError
from dinotrain.metrics.segmentation import SegmentationMeter
from dinotrain.report.mask_section import mask_section
from dinotrain.report.page import Report, Section, render_page

COUNT = 8


@pytest.fixture(scope="module")
def surfaces():
    return [render_surface(0, index, 72) for index in range(COUNT)]


@pytest.fixture(scope="module")
def true(surfaces):
    masks = np.stack([surface.mask for surface in surfaces])
    masks[0, :9, :9] = 255
    return masks


def section(predicted, true, surfaces, load=None) -> Section:
    meter = SegmentationMeter(CLASSES)
    for p, t in zip(predicted, true, strict=True):
        meter.add(p, t)
    names = [f"part {index}" for index in range(len(true))]
    load = load or (lambda index: {"image": surfaces[index].image})
    return mask_section(predicted, true, CLASSES, names, load, meter.result())


def exact(true) -> np.ndarray:
    return np.where(true == 255, 0, true).astype(np.uint8)


def test_the_model_stands_beside_the_commonest_class(true, surfaces):
    part = section(exact(true), true, surfaces)
    model, base = part.tables[0].rows
    assert list(model[1:3]) == ["100.0 %", "1.000"]
    valid = true[true != 255]
    assert base[0] == "always Background"
    assert base[1] == f"{100 * (valid == 0).mean():.1f} %"
    assert [row[0] for row in part.tables[1].rows] == list(CLASSES)


def test_the_worst_pictures_come_first_beside_typical_ones(true, surfaces):
    predicted = exact(true)
    predicted[5] = 3
    predicted[6, :36] = 2
    part = section(predicted, true, surfaces)
    _, worst, typical = part.figures
    assert [p.caption.split("\n")[0] for p in worst.pictures[:2]] == ["part 5", "part 6"]
    assert worst.pictures[0].caption.endswith("mean IoU 0.000")
    shown = {p.caption for p in worst.pictures} & {p.caption for p in typical.pictures}
    assert not shown
    assert [name for name, _ in typical.legend][:3] == list(CLASSES[1:])


def test_only_what_is_shown_is_in_the_legend(true, surfaces):
    predicted = exact(true)
    predicted[0] = 3
    worst = section(predicted, true, surfaces).figures[1]
    assert worst.legend[-1][0] == "no label"
    clean = section(exact(true)[1:], true[1:], surfaces[1:]).figures[1]
    assert len(clean.legend) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_pictures_make_a_page(count, true, surfaces, read_page):
    part = section(exact(true)[:count], true[:count], surfaces)
    assert read_page(render_page(Report(title="t", sections=[part]))).problems == []


def test_nothing_labelled_and_no_picture(true, surfaces):
    def lost(index):
        raise DataError("no such picture")

    part = section(exact(true), np.full_like(true, 255), surfaces)
    assert len(part.figures) == 1
    assert (
        "cannot be read"
        in section(exact(true), true, surfaces, lost).figures[1].pictures[0].caption
    )


def test_what_does_not_fit_is_refused(true, surfaces):
    with pytest.raises(ShapeError, match="must be"):
        mask_section(true[:, 1:], true, CLASSES, [""] * COUNT, dict, {})
    with pytest.raises(ShapeError, match="8 rows and there are 2 names"):
        mask_section(true, true, CLASSES, ["a", "b"], dict, {})
