"""The GPU's part of a report: there where there is a GPU, the same in every form, and not a word of it on a CPU."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autotune.diagnose.costs import Copy, DeviceUse, Kernel, PhaseProfile, Profile
from autotune.machine.device.counters import Counters, unavailable
from autotune.profile.ncu import parse
from autotune.report import Report, read
from autotune.tune.record import report_of
from tests.report.test_report import COMMITTED, HARDWARE, ORIGINAL, PROFILED

GPU = replace(HARDWARE, device="cuda", name="Example GPU", flops_per_s={"float32": 60e12, "tf32": 400e12})
SEEN = Counters(
    sm_utilization=0.97,
    sm_clock_hz=1.2e9,
    sm_clock_max_hz=1.98e9,
    lowered=("power cap",),
    temperature_c=71.0,
    power_w=690.0,
    power_limit_w=700.0,
    other_processes=1,
    other_bytes=5 * 10**9,
    dram_active=0.45,
    readings=4,
    unavailable={"tensor_active": "Not Supported", "sm_active": "Not Supported", "mig": "Insufficient Permissions"},
)
GEMM = "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_64x64_32x6_tn_align8>(Params)"
USE = DeviceUse(
    busy_s=0.0125,
    launches=812,
    kernel_count=812,
    gap_s=0.0195,
    host_wait_s=0.0144,
    late=0.74,
    copy_s=0.0002,
    event_s=0.0301,
    copies=(Copy("DtoH", 1, 0.0002, 8),),
    kernels=(Kernel(GEMM, "aten::mm", "FFN", 61, 0.0075, 0.31), Kernel("reduce", "", "", 40, 0.001)),
    counters=SEEN,
)


def on_gpu(profile: Profile, **changes: Any) -> Profile:
    phases = {name: with_device(phase, **changes) for name, phase in profile.phases.items()}
    return replace(profile, phases=phases)


def with_device(phase: PhaseProfile, **changes: Any) -> PhaseProfile:
    use = replace(USE, **changes)
    return replace(phase, device=use, busy=use.busy_s / phase.seconds, sync_s=0.0003)


TUNED = replace(
    COMMITTED,
    hardware=GPU,
    before=on_gpu(COMMITTED.before),
    after=on_gpu(COMMITTED.after, launches=1, graph_launches=1, busy_s=0.012, counters=None),
)
MEASURED = replace(PROFILED, hardware=GPU, before=on_gpu(PROFILED.before))
BARE = replace(
    MEASURED,
    before=on_gpu(PROFILED.before, counters=unavailable("pynvml is not installed: pip install nvidia-ml-py")),
)
EXPORT = (Path(__file__).parents[1] / "fixtures" / "ncu" / "decode.raw.csv").read_text()
DOUBTED = replace(MEASURED, ncu={"decode": parse(EXPORT)})


def forms(report: Report) -> list[str]:
    out = io.StringIO()
    report.to_terminal(Console(file=out, width=400))
    return [out.getvalue(), report.to_markdown().replace("\\", "")]


SAID = [
    (
        report_of(MEASURED),
        [
            "What the GPU does in a call and for a token",
            "waits for host ms",
            "812",
            "61 %",  # idle: 12.5 of 32 ms
            "30.1",  # by events
            "Warning: the GPU's clocks were lowered (1200 of 1980 MHz): power cap.",
            "Warning: another process computes on the GPU with 5 GB: its figures are theirs, too.",
            "Counters during decode: a kernel running 97 %, DRAM bandwidth 45 %, SM clock 1200 of 1980 MHz, "
            "690 of 700 W, 71 degrees C.",
            "Not available: tensor active, sm active (Not Supported).",
            "Not available: mig (Insufficient Permissions).",
            "Longest kernels of decode",
            "aten::mm",
            "60 %",  # of the device's time
            "Roofline of decode",
            "FLOP per byte",
            "in tf32",
        ],
    ),
    (report_of(TUNED), ["decode, now", "812"]),
    (report_of(BARE), ["Not available: counters (pynvml is not installed: pip install nvidia-ml-py)."]),
    (
        report_of(DOUBTED),
        [
            "Nsight Compute, decode",
            "Nsight Compute counts over 3 kernels: SMs 15 %",
            "It warned: No metrics to collect found in sections.",
            "void gemv_kernel<float, 4>",
            "6.0",
        ],
    ),
]


@pytest.mark.parametrize(("report", "said"), SAID, ids=["measured", "tuned", "no counters", "Nsight Compute"])
def test_every_form_tells_what_the_device_did(report: Report, said: list[str]) -> None:
    for text in forms(report):
        assert [s for s in said if s not in text] == []
        assert "nan" not in text.lower().replace("nanosecond", "")


@pytest.mark.parametrize("report", [report_of(each) for each in (MEASURED, TUNED, BARE, DOUBTED)])
def test_a_record_read_back_shows_the_same(report: Report) -> None:
    record = json.loads(report.to_json())
    assert Report(record).to_markdown() == report.to_markdown()
    assert str(read(record)) == str(report)
    assert max(len(line) for line in str(report).splitlines()) <= 120


def test_the_record_has_every_figure() -> None:
    record = report_of(TUNED).to_dict()["device"]
    assert set(record) == {"prefill", "decode"}
    before, after = record["decode"]["before"], record["decode"]["after"]
    assert (before["launches"], after["launches"], after["graph_launches"]) == (812, 1, 1)
    assert before["idle"] == pytest.approx(1 - 12.5 / 32)
    assert before["host_ms"] == pytest.approx(19.5)
    assert before["kernels"][0]["operator"] == "aten::mm"
    assert before["copies"] == [{"direction": "DtoH", "count": 1, "seconds": 0.0002, "size_bytes": 8}]
    assert before["counters"]["power_w"] == 690.0
    assert len(before["warnings"]) == 2
    assert after["counters"] is None


def test_what_was_not_measured_is_nothing_in_the_record() -> None:
    record = report_of(replace(PROFILED, before=on_gpu(PROFILED.before, event_s=nan, counters=None))).to_dict()
    assert record["device"]["decode"]["before"]["event_ms"] is None


def test_operations_are_put_against_their_roofline() -> None:
    row = next(r for r in report_of(MEASURED).to_dict()["operators"]["decode"] if r["group"] == "FFN")
    floor_s = max(row["flops"] / 60e12, row["moved_bytes"] / 25e9)
    assert row["roofline_share"] == pytest.approx(floor_s / (row["before_ms"] / 1e3))


@pytest.mark.parametrize("report", [report_of(ORIGINAL), report_of(COMMITTED), report_of(PROFILED)])
def test_a_cpus_report_has_nothing_of_it(report: Report) -> None:
    assert report.to_dict()["device"] == {}
    for text in forms(report):
        assert all(word not in text for word in ("GPU", "kernels of", "Roofline of", "Nsight", "launches"))


def test_a_record_of_an_earlier_version_is_still_read() -> None:
    old = report_of(ORIGINAL).to_dict()
    for key in ("device", "ncu"):
        del old[key]
    for rows in old["operators"].values():
        for row in rows:
            del row["flops"], row["moved_bytes"], row["roofline_share"]
    assert "GPU" not in str(read(old))
