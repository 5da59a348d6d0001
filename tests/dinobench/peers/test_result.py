"""Goals judged and shown, on times that are given."""

import msgspec
import pytest

from dinobench.machine import Machine
from dinobench.peers.profile import OperationTime, read_onnx_events, read_samples, sum_kinds
from dinobench.peers.result import GOALS, Goal, PeersReport, Row, SizeResult, judge
from dinobench.peers.table import render
from dinobench.peers.worker import Turn

GOAL = Goal(what="ours ÷ theirs", above=("a", "b"), below=("c", "d"), limits={224: 0.85})


def turns(**ms: float) -> dict[str, list[Turn]]:
    return {n: [Turn(wall_s=(v / 1e3,), cpu_s=(v / 1e3,))] * 5 for n, v in ms.items()}


@pytest.mark.parametrize(("ours", "reached"), [(8, True), (9, False)])
def test_the_fastest_of_each_side_are_compared(ours, reached) -> None:
    (found,), missing = judge((GOAL,), turns(a=20, b=ours, c=10, d=30), 224)
    assert (found.above, found.below) == ("b", "c")
    assert found.ratio.value == pytest.approx(ours / 10)
    assert found.reached is reached
    assert not missing


def test_a_side_that_is_missing_is_said() -> None:
    assert judge((GOAL,), turns(a=1, b=1), 224) == ((), ("ours ÷ theirs",))


def test_a_size_without_a_limit_is_measured_only() -> None:
    (found,), _ = judge((GOAL,), turns(a=1, c=1), 336)
    assert found.limit is None and found.reached is None


def test_all_goals_name_both_sizes_and_candidates_that_exist() -> None:
    from dinobench.peers.candidates import OUR_PRECISIONS, all_candidates

    names = {candidate.name for candidate in all_candidates(OUR_PRECISIONS)}
    assert GOALS
    for goal in GOALS:
        assert {*goal.above, *goal.below} <= names
        assert set(goal.limits) == {224, 518}


def test_table_shows_what_is_reached_skipped_and_profiled() -> None:
    goals, missing = judge(
        (GOAL, msgspec.structs.replace(GOAL, what="gone", above=("x",))), turns(a=9, c=10), 224
    )
    rows = (
        Row(
            name="a",
            what="how",
            size_mb=1,
            wall_ms=9,
            cpu_ms=8.5,
            of_roofline=1.2,
            worst=1e-6,
            sqnr_db=99.4,
            profile=(OperationTime(kind="Gemm", count=3, ms=7.5),),
        ),
        Row(name="b", what="how", skipped="cannot a|b"),
    )
    machine = Machine(
        processor="P", cores=2, memory_gb=8, system="S", python="3", versions={"torch": "2"}
    )
    result = SizeResult(
        size=224, hot=False, runs=30, gflop=12.2, rows=rows, goals=goals, missing=missing
    )
    report = PeersReport(
        machine=machine, versions={"torch": "2"}, note="busy", sizes=(result,), passed=False
    )
    text = render(report)
    assert text == render(report)
    assert "| ours ÷ theirs (a ÷ c) | 0.90 (0.90–0.90) | ≤ 0.85 | NOT REACHED |" in text
    assert "| gone | – | | a side is missing |" in text
    assert "| a | how | 1.0 | 9.0 | 8.5 | 1.20 | 1.0e-06 | 99 |  |" in text
    assert "skipped: cannot a\\|b" in text
    assert "- a: Gemm ×3 7.5" in text
    assert "Host figures" in text and "Note: busy." in text
    assert msgspec.json.decode(msgspec.json.encode(report), type=PeersReport) == report


def test_profile_takes_each_nodes_median_and_adds_up_kinds() -> None:
    def event(node: str, kind: str, us: float) -> dict:
        return {
            "cat": "Node",
            "name": f"{node}_kernel_time",
            "dur": us,
            "args": {"op_name": kind},
        }

    events = [event("m1", "MatMul", us) for us in (1000, 9000, 1200)]
    events += [event("m2", "MatMul", us) for us in (2000, 2000, 2000)]
    events += [event("s", "Softmax", 100), {"cat": "Session", "name": "model_run", "dur": 1e6}]
    events += [{"cat": "Node", "name": "m1_fence_before", "dur": 5e5, "args": {"op_name": "x"}}]
    assert sum_kinds(read_onnx_events(events)) == (
        OperationTime(kind="MatMul", count=2, ms=3.2),
        OperationTime(kind="Softmax", count=1, ms=0.1),
    )


def test_samples_are_added_up_by_kind_of_kernel() -> None:
    report = """# Samples: 4K of event 'cpu-clock'
#
    50.50%  [.] xnn_qs8_qc8w_gemm_minmax_fp32_ukernel_7x16c8__avx512vnni_prfm    -      -
    20.25%  [.] xnn_f32_gemm_minmax_ukernel_7x32__avx512f_broadcast
     5.00%  [.] xnn_f32_gemm_minmax_ukernel_1x32__avx512f_broadcast
     2.00%  [k] clear_page_erms
     1.00%  [.] __memmove_avx512_unaligned_erms
"""
    rows = sum_kinds((kind, share * 20) for kind, share in read_samples(report))
    assert [(row.kind, row.count) for row in rows] == [
        ("qs8_qc8w_gemm", 1),
        ("f32_gemm", 2),
        ("not a kernel", 2),
    ]
    assert [row.ms for row in rows] == pytest.approx([10.1, 5.05, 0.6])
