"""What a device did, from traces made by hand (tests/fixtures): every figure was computed with pencil and paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.diagnose.costs import Copy
from autotune.errors import MeasurementError
from autotune.profile.recording import Recording, read
from autotune.profile.timeline import Timeline, direction, seconds_by_caller, timeline

TRACES = Path(__file__).parents[1] / "fixtures" / "traces"
US = 1e-6


def recorded(name: str) -> Recording:
    return read((TRACES / f"{name}.json").read_bytes())


# All times in microseconds. Events are relative to the first of a trace.
EXPECTED: dict[str, dict[str, Any]] = {
    "eager": {  # 20-40, 42-46, 70-74, 84-90
        "seconds": 100,
        "busy_s": 34,
        "launches": 3,
        "kernel_count": 3,
        "graph_launches": 0,
        "gap_s": 2 + 24 + 10,
        "gaps": 3,
        "host_wait_s": 24 + 10,
        "host_waits": 2,
        "launch_s": 8,  # 62 -> 70 and 76 -> 84
        "copy_s": 6,
        "sync_s": 15,
    },
    "graph": {  # 5-10, 20-50, 51-60, 61-70
        "seconds": 80,
        "busy_s": 53,
        "launches": 2,  # an operator's kernel, and a graph of three
        "kernel_count": 4,
        "graph_launches": 1,
        "gap_s": 12,
        "gaps": 3,
        "host_wait_s": 0,  # the graph was launched while the copy ran
        "host_waits": 0,
        "launch_s": 0,
        "copy_s": 0,
        "sync_s": 60,
    },
    "streams": {  # 10-30 and 20-40, 35-55 from the host, 60-70, 65-80 on the device
        "seconds": 80,
        "busy_s": 65,
        "launches": 3,
        "kernel_count": 3,
        "graph_launches": 0,
        "gap_s": 5,
        "gaps": 1,
        "host_wait_s": 0,
        "host_waits": 0,
        "launch_s": 0,
        "copy_s": 15,  # 40-55: until 40 a kernel ran beside it
        "sync_s": 0,
    },
    "uncorrelated": {  # 10-20, 30-35
        "seconds": 35,
        "busy_s": 15,
        "launches": 2,
        "kernel_count": 2,
        "graph_launches": 0,
        "gap_s": 10,
        "gaps": 1,
        "host_wait_s": 0,  # nobody knows when it was launched: not held against the host
        "host_waits": 0,
        "launch_s": 0,
        "copy_s": 0,
        "sync_s": 0,
    },
    "empty": {"seconds": 0, "busy_s": 0, "launches": 0, "kernel_count": 0, "gap_s": 0, "copy_s": 0, "sync_s": 0},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_whole_trace(name: str) -> None:
    found = timeline(recorded(name))
    for figure, expected in EXPECTED[name].items():
        scale = US if figure.endswith("_s") or figure == "seconds" else 1
        assert getattr(found, figure) == pytest.approx(expected * scale, abs=1e-9), figure
    assert found.idle == pytest.approx(1 - found.busy_s / found.seconds if found.seconds else 0.0)


@pytest.mark.parametrize(
    ("window", "busy", "gap", "waited", "launches", "sync"),
    [
        ((30, 72), 10 + 4 + 2, 26, 24, 2, 0),  # cuts the first kernel, which counts where it starts, and the last
        ((50, 60), 0, 10, 10, 0, 0),  # inside a gap
        ((85, 100), 5, 0, 0, 0, 10),
        ((0, 20), 0, 0, 0, 0, 0),  # before the first kernel there is no gap: nothing had ended
    ],
)
def test_a_window_counts_what_lies_inside(
    window: tuple[float, float], busy: float, gap: float, waited: float, launches: int, sync: float
) -> None:
    found = timeline(recorded("eager"), (window[0] * US, window[1] * US))
    figures = (found.busy_s, found.gap_s, found.host_wait_s, found.sync_s)
    assert figures == pytest.approx((busy * US, gap * US, waited * US, sync * US), abs=1e-9)
    assert found.launches == launches


def test_a_kernel_belongs_to_its_operator_and_its_part_of_the_model() -> None:
    rows = {(k.operator, k.group): k for k in timeline(recorded("eager")).kernels}
    assert set(rows) == {("aten::mm", "FFN"), ("aten::add", "FFN"), ("aten::mul", "")}
    mm = rows["aten::mm", "FFN"]
    assert (mm.count, mm.occupancy) == (1, 0.5)
    assert mm.seconds == pytest.approx(20 * US)
    assert "gemm" in mm.name
    assert [k.seconds for k in timeline(recorded("eager")).kernels] == sorted(
        (k.seconds for k in rows.values()), reverse=True
    )


@pytest.mark.parametrize(
    ("written", "share"),
    [("0", 0.0), ("1", 0.01), ("37.5", 0.375), ("100", 1.0), ("-99", None), ("null", None), ('"50"', None)],
)
def test_the_occupancy_of_a_kernel(written: str, share: float | None) -> None:
    """A block on 132 multiprocessors fills 0 % of them. What the profiler cannot compute is -1, rounded as a share."""
    text = (TRACES / "eager.json").read_text().replace('occupancy %": 50', f'occupancy %": {written}')
    (mm,) = (kernel for kernel in timeline(read(text)).kernels if kernel.operator == "aten::mm")
    assert mm.occupancy == share


def test_kernels_of_a_graph_have_no_operator_and_one_launch() -> None:
    recording = recorded("graph")
    inside = [work for work in recording.work if work.launch is not None and work.launch.name == "cudaGraphLaunch"]
    assert len(inside) == 3
    assert {work.correlation for work in inside} == {2}
    assert all(work.operator is None for work in inside)


def test_without_a_launch_the_external_id_tells_the_operator() -> None:
    first, second = recorded("uncorrelated").work
    assert first.operator is not None
    assert first.operator.name == "aten::mm"
    assert (second.operator, second.launch) == (None, None)


def test_a_copy_to_pageable_memory_keeps_the_host_waiting() -> None:
    """cudaMemcpyAsync returns when the data is there, unless memory is pinned (CUDA Runtime API, memcpy-sync)."""
    pageable = (TRACES / "eager.json").read_text().replace("Device -> Pinned", "Device -> Pageable")
    assert timeline(read(pageable)).sync_s == pytest.approx((15 + 3) * US)


def test_time_by_the_operator_that_launched_it_itself() -> None:
    found = {call.name: seconds for call, seconds in seconds_by_caller(recorded("eager"), (0.0, 1.0)).items()}
    expected = {"aten::mm": 20 * US, "aten::add": 4 * US, "aten::mul": 4 * US, "aten::copy_": 6 * US}
    assert found == pytest.approx(expected)  # aten::linear launched nothing: aten::mm inside it did


def test_copies_by_direction() -> None:
    found = timeline(recorded("streams")).copies
    assert [(c.direction, c.count, c.size_bytes) for c in found] == [("DtoD", 1, 2048), ("HtoD", 1, 1 << 20)]
    assert [c.seconds for c in found] == pytest.approx([15 * US, 20 * US])
    assert timeline(recorded("eager")).copies == (Copy("DtoH", 1, pytest.approx(6 * US), 4096),)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Memcpy HtoD (Pageable -> Device)", "HtoD"),
        ("Memcpy DtoH (Device -> Pinned)", "DtoH"),
        ("Memcpy PtoP (Device -> Device)", "PtoP"),
        ("Memcpy (unknown)", "other"),
    ],
)
def test_the_direction_of_a_copy(name: str, found: str) -> None:
    assert direction(name) == found


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_trace_that_ends_in_the_middle_is_refused(share: float) -> None:
    text = (TRACES / "eager.json").read_bytes()
    with pytest.raises(MeasurementError, match="cannot be read"):
        read(text[: int(len(text) * share)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("7", "no list of events"),
        ('{"traceEvents": 3}', "no list of events"),
        ("[" * 10**5, "cannot"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        read(text)


@pytest.mark.parametrize(
    "odd",
    [
        "[]",
        '[1, null, "x", {}]',
        '[{"ph": "X", "cat": "kernel", "name": "k", "ts": 1}]',
        '[{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": -4}]',
        '[{"ph": "X", "cat": "kernel", "name": "k", "ts": NaN, "dur": 4}]',
        '[{"ph": "X", "cat": "python_function", "name": "f", "ts": 1, "dur": 4}]',
    ],
)
def test_events_that_say_nothing_are_left_out(odd: str) -> None:
    assert timeline(read(f'{{"traceEvents": {odd}}}')) == Timeline(0.0)


def test_arguments_of_the_wrong_kind_do_no_harm() -> None:
    event = '{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 4, "args": %s}'
    for arguments in ("3", '{"correlation": "7", "bytes": NaN, "stream": []}', '{"correlation": null}'):
        assert timeline(read(f"[{event % arguments}]")).busy_s == pytest.approx(4 * US)


EVENTS = st.fixed_dictionaries(
    {
        "ph": st.sampled_from(["X", "X", "X", "i"]),
        "cat": st.sampled_from(["cpu_op", "user_annotation", "cuda_runtime", "kernel", "gpu_memcpy", "ac2g"]),
        "name": st.sampled_from(
            ["aten::mm", "cudaLaunchKernel", "cudaGraphLaunch", "cudaStreamSynchronize", "Memcpy HtoD"]
        ),
        "ts": st.integers(0, 100) | st.floats(0, 100),
        "dur": st.integers(-1, 50) | st.none(),
        "tid": st.integers(0, 1),
        "args": st.dictionaries(
            st.sampled_from(["correlation", "External id", "bytes", "Input Dims"]), st.integers(0, 4) | st.none()
        ),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=12), st.integers(0, 60), st.integers(0, 60))
def test_whatever_is_in_a_trace_its_figures_agree(events: list[dict[str, Any]], start: int, length: int) -> None:
    found = timeline(read(json.dumps(events)), (start * US, (start + length) * US))
    slack = 1e-12
    assert 0 <= found.busy_s <= found.seconds + slack
    assert 0 <= found.host_wait_s <= found.gap_s + slack <= found.seconds - found.busy_s + 2 * slack
    assert -slack <= found.copy_s <= found.busy_s + slack
    assert found.graph_launches <= found.launches
    assert found.host_waits <= found.gaps
    rows = (row.seconds for row in found.kernels), (row.seconds for row in found.copies)
    assert sum(map(sum, rows)) >= found.busy_s - slack
