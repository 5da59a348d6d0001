"""Segmentation metrics against loops over pixels, scikit-learn and hand-counted masks."""

import json
import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from dinotrain.data.masks import IGNORE
from dinotrain.errors import DataError, ShapeError
from dinotrain.metrics import segmentation
from dinotrain.metrics.segmentation import (
    SegmentationMeter,
    SegmentationRules,
    confusion_matrix,
    count_covered,
    measure_shapes,
    outline,
    overlap,
)

CLASSES = ("Background", "Dust", "Scratch")


def plane(text: str) -> np.ndarray:
    """Rows of digits; '.' is 0 and 'x' is ignored."""
    rows = [row.strip() for row in text.strip().splitlines()]
    table = {".": 0, "x": IGNORE} | {str(n): n for n in range(10)}
    return np.array([[table[char] for char in row] for row in rows], dtype=np.uint8)


def blobs(seed: int, shape=(23, 31)) -> tuple[np.ndarray, np.ndarray]:
    """Return a predicted and a true mask of three classes that are alike but not the same."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.6)
    other = field + 0.06 * ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    cuts = np.quantile(field, [0.6, 0.85])
    true = np.digitize(field, cuts).astype(np.uint8)
    true[rng.random(shape) < 0.04] = IGNORE
    return np.digitize(other, cuts).astype(np.uint8), true


# --- slow formulas, written from their definitions


def points(mask) -> list[tuple[int, int]]:
    return [(int(r), int(c)) for r, c in np.argwhere(mask)]


def nearest(point, others) -> float:
    return min((math.dist(point, other) for other in others), default=math.inf)


def slow_near(p, g, tolerance) -> tuple[int, int]:
    in_p, in_g = points(p), points(g)
    near = {x for x in in_p if nearest(x, in_g) <= tolerance}
    near |= {x for x in in_g if nearest(x, in_p) <= tolerance}
    return len(near), len(set(in_p) | set(in_g))


def slow_components(mask) -> list[set[tuple[int, int]]]:
    left, found = set(points(mask)), []
    while left:
        part, queue = set(), [left.pop()]
        while queue:
            row, col = queue.pop()
            part.add((row, col))
            around = {(row + a, col + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= around
            queue += around
        found.append(part)
    return found


def slow_covered(mask, other, least, cover) -> tuple[int, int]:
    parts = [part for part in slow_components(mask) if len(part) >= least]
    hits = [sum(bool(other[x]) for x in part) >= cover * len(part) for part in parts]
    return sum(hits), len(parts)


def slow_outline(mask, valid) -> list[tuple[int, int]]:
    height, width = mask.shape

    def is_outside(row, col) -> bool:
        inside_picture = 0 <= row < height and 0 <= col < width
        return inside_picture and valid[row, col] and not mask[row, col]

    return [
        (r, c)
        for r, c in points(mask)
        if any(is_outside(r + a, c + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1)))
    ]


def slow_shapes(p, g, valid, rules) -> dict[str, float]:
    near, union = slow_near(p, g, rules.tolerance_px)
    found, true = slow_covered(g, p, rules.min_instance_px, rules.min_cover)
    right, predicted = slow_covered(p, g, rules.min_instance_px, rules.min_cover)
    p_edge, g_edge = slow_outline(p, valid), slow_outline(g, valid)
    to_g, to_p = [nearest(x, g_edge) for x in p_edge], [nearest(x, p_edge) for x in g_edge]
    both = bool(p_edge and g_edge)
    return {
        "near": near,
        "union": union,
        "true": true,
        "found": found,
        "predicted": predicted,
        "right": right,
        "true_edge": len(g_edge),
        "true_edge_near": sum(d <= rules.tolerance_px for d in to_p),
        "predicted_edge": len(p_edge),
        "predicted_edge_near": sum(d <= rules.tolerance_px for d in to_g),
        "distance_px": sum(to_g + to_p) / (len(to_g) + len(to_p)) if both else 0.0,
        "both": both,
        "one_sided": bool(p_edge) != bool(g_edge),
    }


def differences(seed: int, rules: SegmentationRules) -> list[str]:
    """Names of the counts that differ from the slow formulas, over both defect classes."""
    predicted, true = blobs(seed)
    valid = true != IGNORE
    wrong = []
    for number in (1, 2):
        p, g = (predicted == number) & valid, true == number
        counts = measure_shapes(p, g, valid, rules)
        slow = slow_shapes(p, g, valid, rules)
        # Distances are square roots of whole numbers, summed in another order.
        wrong += [k for k, v in slow.items() if not math.isclose(getattr(counts, k), v)]
    return wrong


RULES = [
    SegmentationRules(),
    SegmentationRules(tolerance_px=1.0, min_instance_px=1, min_cover=0.8),
    SegmentationRules(tolerance_px=2.5, min_instance_px=4, min_cover=0.3),
]


@pytest.mark.parametrize("rules", RULES, ids=["default", "strict", "loose"])
@pytest.mark.parametrize("seed", range(4))
def test_shapes_are_those_of_the_slow_formulas(seed, rules):
    assert differences(seed, rules) == []


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("4-connected", {"true", "found", "predicted", "right"}),
        ("8-neighbour outline", {"true_edge", "predicted_edge"}),
        ("chessboard distance", {"near", "distance_px"}),
        ("picture's edge is an outline", {"true_edge", "predicted_edge"}),
    ],
)
def test_a_fault_is_seen_by_the_slow_formulas(fault, seen, monkeypatch):
    if fault == "4-connected":
        monkeypatch.setattr(segmentation, "_EIGHT", segmentation._CROSS)
    elif fault == "8-neighbour outline":
        monkeypatch.setattr(segmentation, "_CROSS", segmentation._EIGHT)
    elif fault == "chessboard distance":
        edt = ndimage.distance_transform_cdt
        monkeypatch.setattr(segmentation.ndimage, "distance_transform_edt", edt)
    else:
        erode = ndimage.binary_erosion
        monkeypatch.setattr(
            segmentation.ndimage,
            "binary_erosion",
            lambda mask, structure, border_value: erode(mask, structure),
        )
    found = {name for seed in range(4) for name in differences(seed, RULES[1])}
    assert found & seen


@pytest.mark.parametrize("seed", range(3))
def test_overlap_against_scikit_learn(seed):
    predicted, true = blobs(seed)
    keep = true != IGNORE
    confusion = confusion_matrix(predicted, true, 3)
    assert np.array_equal(
        confusion, sklearn_metrics.confusion_matrix(true[keep], predicted[keep], labels=[0, 1, 2])
    )
    iou, dice = overlap(confusion)
    for found, reference in ((iou, "jaccard_score"), (dice, "f1_score")):
        score = getattr(sklearn_metrics, reference)
        wanted = score(true[keep], predicted[keep], labels=[0, 1, 2], average=None)
        assert found == pytest.approx(wanted.tolist())
    # Rows and columns the wrong way round would go unnoticed in a symmetric matrix.
    assert not np.array_equal(confusion, confusion.T)


def test_by_hand():
    true = plane("""
        .....
        .11..
        .11.x
        ....x
    """)
    predicted = plane("""
        .....
        ..11.
        ..11.
        ...2.
    """)
    rules = SegmentationRules(tolerance_px=1.0, min_instance_px=4)
    meter = SegmentationMeter(CLASSES, rules)
    meter.add(predicted, true)
    result = meter.result()
    # 18 labelled pixels: 2 of class 1 hit, 2 missed, 2 too many; one of class 2 too many.
    assert result["pixels"] == 18
    assert result["confusion"] == [[11, 2, 1], [2, 2, 0], [0, 0, 0]]
    assert result["pixel_accuracy"] == pytest.approx(13 / 18)
    dust, scratch = result["classes"]["Dust"], result["classes"]["Scratch"]
    assert dust["iou"] == pytest.approx(2 / 6)
    assert dust["dice"] == pytest.approx(4 / 8)
    assert result["mean_iou"] == pytest.approx((11 / 16 + 2 / 6 + 0) / 3)
    # Every pixel of either is one step from the other.
    assert dust["bt_iou"] == 1.0
    # One instance of 4 pixels, half covered: exactly enough.
    assert (dust["instances"], dust["detection_rate"], dust["detection_precision"]) == (1, 1, 1)
    # The outlines are all 4 pixels of each: 2 at distance 0 and 2 at distance 1 either way.
    assert dust["surface_distance_px"] == pytest.approx(0.5)
    assert dust["bf1"] == 1.0
    assert (scratch["iou"], scratch["bt_iou"], scratch["bf1"]) == (0, 0, 0)
    assert (scratch["surface_distance_px"], scratch["one_sided_images"]) == (None, 1)
    # A single pixel is no instance of 4.
    assert (scratch["predicted_instances"], scratch["detection_rate"]) == (0, None)
    assert result["majority_predictor"] == {
        "class": "Background",
        "pixel_accuracy": pytest.approx(14 / 18),
        "mean_iou": pytest.approx((14 / 18 + 0) / 2),
    }


def test_tolerance_by_hand():
    """Two lines d pixels apart: distance d, near up to the tolerance and not beyond."""
    rules = SegmentationRules(tolerance_px=3.0)
    for gap in (0, 1, 3, 4):
        true, predicted = np.zeros((12, 20), np.uint8), np.zeros((12, 20), np.uint8)
        true[2], predicted[2 + gap] = 1, 1
        meter = SegmentationMeter(CLASSES, rules)
        meter.add(predicted, true)
        row = meter.result()["classes"]["Dust"]
        assert row["surface_distance_px"] == pytest.approx(gap)
        assert row["bt_iou"] == row["bf1"] == (1.0 if gap <= 3 else 0.0)
        assert row["detection_rate"] == (1.0 if gap == 0 else 0.0)


def test_asymmetric_outlines():
    """A point against a long line: precision 1, recall a part, and both means in the distance."""
    true, predicted = np.zeros((5, 21), np.uint8), np.zeros((5, 21), np.uint8)
    true[2], predicted[2, 0] = 1, 1
    meter = SegmentationMeter(CLASSES, SegmentationRules(tolerance_px=3.0))
    meter.add(predicted, true)
    row = meter.result()["classes"]["Dust"]
    assert row["bf1"] == pytest.approx(2 * 1 * (4 / 21) / (1 + 4 / 21))
    assert row["surface_distance_px"] == pytest.approx(sum(range(21)) / 22)


def test_unknown_neighbours_make_no_outline():
    mask = plane("111.\n111.\nxx1.") == 1
    valid = plane("111.\n111.\nxx1.") != IGNORE
    assert outline(mask, valid).astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert outline(mask, np.ones_like(valid)).sum() == 5


def test_cover_limit_is_exact():
    mask = plane("1111\n....\n1111\n1111") == 1
    half, less = mask.copy(), mask.copy()
    half[0, :2], less[0, :3] = False, False
    rules = SegmentationRules(min_instance_px=4)
    assert count_covered(mask, half, rules) == (2, 2)
    assert count_covered(mask, less, rules) == (1, 2)
    assert count_covered(mask, less, SegmentationRules(min_instance_px=5)) == (1, 1)


def test_a_perfect_and_an_absent_class():
    _, true = blobs(0)
    true[true == 2] = 0
    meter = SegmentationMeter(CLASSES)
    meter.add(np.where(true == IGNORE, 2, true), true)
    result = meter.result()
    assert (result["mean_iou"], result["pixel_accuracy"], result["mean_bt_iou"]) == (1, 1, 1)
    dust, scratch = result["classes"]["Dust"], result["classes"]["Scratch"]
    assert (dust["surface_distance_px"], dust["bf1"], dust["detection_rate"]) == (0, 1, 1)
    # What is predicted only where there is no label does not count.
    assert (scratch["iou"], scratch["bf1"], scratch["predicted_pixels"]) == (None, None, 0)


def test_pictures_add_up_in_any_order_and_over_processes():
    pairs = [blobs(seed, (20 + seed, 25)) for seed in range(4)]
    whole, first, second = (SegmentationMeter(CLASSES) for _ in range(3))
    for number, (predicted, true) in enumerate(pairs):
        whole.add(predicted, true)
        (first if number % 2 else second).add(predicted, true)
    second.merge(first)
    merged, wanted = second.result(), whole.result()
    assert merged["confusion"] == wanted["confusion"]
    for name in CLASSES:
        assert merged["classes"][name] == pytest.approx(wanted["classes"][name])
    # Overlap is of all pixels, never a mean over pictures.
    assert wanted["pixel_accuracy"] == pytest.approx(
        sum((p == t)[t != IGNORE].sum() for p, t in pairs)
        / sum((t != IGNORE).sum() for _, t in pairs)
    )


def test_background_counts_only_where_asked():
    meter = SegmentationMeter(CLASSES, SegmentationRules(background=None))
    meter.add(*blobs(1))
    assert meter.result()["classes"]["Background"]["bf1"] is not None
    meter = SegmentationMeter(CLASSES)
    meter.add(*blobs(1))
    background = meter.result()["classes"]["Background"]
    assert (background["bf1"], background["instances"]) == (None, None)
    assert background["iou"] is not None


def test_nothing_at_all_gives_no_figures_and_json_holds_them():
    empty = SegmentationMeter(CLASSES).result()
    assert (empty["mean_iou"], empty["pixel_accuracy"], empty["images"]) == (None, None, 0)
    ignored = SegmentationMeter(CLASSES)
    ignored.add(np.zeros((3, 3), np.uint8), np.full((3, 3), IGNORE, np.uint8))
    assert ignored.result()["mean_iou"] is None
    meter = SegmentationMeter(CLASSES)
    meter.add(*blobs(2))
    assert json.loads(json.dumps(meter.result())) == meter.result()


def test_refusals():
    meter = SegmentationMeter(CLASSES)
    with pytest.raises(ShapeError, match="two planes of one size"):
        meter.add(np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8))
    with pytest.raises(DataError, match="predicted mask holds 0 to 3"):
        meter.add(plane("..3"), plane("..1"))
    with pytest.raises(DataError, match="true mask holds 0 to 7"):
        meter.add(plane("..1"), plane("..7"))
    with pytest.raises(DataError, match="predicted mask holds -1"):
        meter.add(np.array([[-1, 0]]), np.array([[0, 0]]))
    assert meter.images == 0
    # Where there is no label, any prediction is ignored.
    meter.add(plane("..9"), plane("..x"))


def test_the_majority_may_come_from_elsewhere():
    meter = SegmentationMeter(("a", "b"))
    meter.add(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 0, 1]]))
    assert meter.result()["majority_predictor"]["class"] == "a"
    assert meter.result(majority=1)["majority_predictor"] == {
        "class": "b",
        "pixel_accuracy": 0.25,
        # a: 0 of 3; b: 1 of 4.
        "mean_iou": 0.125,
    }
