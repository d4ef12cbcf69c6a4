"""Nsight Compute: the command that is printed, and exports made by hand (tests/fixtures) read back."""

from __future__ import annotations

import contextlib
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import MeasurementError
from autotune.machine import device
from autotune.profile.ncu import METRICS, RANGES, command, number, parse
from autotune.profile.ncu_replay import replay
from autotune.workload import PHASES
from tests import models
from tests.fakes.cuda import FakeCuda

EXPORTS = Path(__file__).parents[1] / "fixtures" / "ncu"
RAW, DETAILS = (EXPORTS / "decode.raw.csv").read_text(), (EXPORTS / "decode.details.csv").read_text()


def test_the_raw_page() -> None:
    reading = parse(RAW)
    gemv, reduce = reading.kernels  # the longest first
    assert (gemv.name, gemv.count) == ("void gemv_kernel<float, 4>(int, float const *)", 2)
    assert gemv.seconds == pytest.approx(40e-6)
    # 30 us and 10 us: means are weighted by time
    assert (gemv.sm, gemv.memory, gemv.dram) == pytest.approx((0.19, 0.815, 0.775))
    assert gemv.tensor == pytest.approx(0.10)  # of the launch that has it
    assert gemv.tensor_instructions == 4000  # the pipe's own sum, not its parts' besides
    assert gemv.sectors_per_request == 6  # 12,000 over 2,000
    assert (reduce.name, reduce.sectors_per_request) == ("reduce_kernel", None)  # it loads nothing
    assert reading.total.count == 3
    assert reading.total.seconds == pytest.approx(50e-6)
    assert reading.notes == ("No metrics to collect found in sections.",)
    assert reading.evidence() == (
        "Nsight Compute counts over 3 kernels: SMs 15 %, memory 66 %, DRAM 63 % of their speed of light; tensor pipes "
        "8 % used; 6.0 sectors per request (4 is ideal for 4-byte loads)"
    )


def test_the_details_page() -> None:
    (gemm,) = parse(DETAILS).kernels
    assert gemm.seconds == pytest.approx(1.2505e-3)
    assert (gemm.sm, gemm.memory) == pytest.approx((0.9, 0.405))  # the share, not the bytes per second of that name
    assert gemm.tensor_instructions == 1_000_000
    assert (gemm.dram, gemm.tensor, gemm.sectors_per_request) == (None, None, None)


def without_column(name: str) -> str:
    """The raw page as an export that was made without a metric."""
    import csv
    import io

    lines = [line for line in RAW.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    at = rows[0].index(name)
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([row[:at] + row[at + 1 :] for row in rows])
    return out.getvalue()


@pytest.mark.parametrize(
    ("column", "lost"),
    [
        ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm"),
        ("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", "memory"),
        ("gpu__time_duration.sum", "seconds"),
        ("l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum", "sectors_per_request"),
        ("Kernel Name", None),
        ("Host Name", None),
    ],
)
def test_a_missing_column_is_a_missing_figure(column: str, lost: str | None) -> None:
    whole, found = parse(RAW).total, parse(without_column(column)).total
    for name in ("seconds", "sm", "memory", "dram", "tensor_instructions", "sectors_per_request"):
        if name == lost:
            assert getattr(found, name) is None
        elif column != "gpu__time_duration.sum":  # without it means are not weighted
            assert getattr(found, name) == pytest.approx(getattr(whole, name))


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        (lambda text: "\ufeff" + text, 3),
        (lambda text: text.replace("\n", "\r\n"), 3),
        (lambda text: text.replace("==PROF== Disc", "what the program printed, with commas\n==PROF== Disc"), 3),
        (lambda text: text + "==PROF== Disconnected\n", 3),
        (lambda text: text[:-60], 2),  # the last row is cut
        (lambda text: text.rstrip()[:-1], 2),  # only its last quote is missing: a digit may be, too
        (lambda text: text.replace('"ns"', '"usecond"'), 3),
        (lambda text: text + text[text.index('"ID"') :], 6),  # two processes, each with headings
    ],
)
def test_exports_as_they_come(change: Callable[[str], str], kernels: int) -> None:
    assert parse(change(RAW)).total.count == kernels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a CSV export"),
        ("a,b\n1,2\n", "not a CSV export"),
        ((EXPORTS / "forbidden.csv").read_text(), "ERR_NVGPUCTRPERM.*as root"),
        ("==ERROR== The application returned an error code (1).\n", "returned an error code"),
        (RAW[: RAW.index('"0"')], "profiled no kernel"),
        (RAW[: RAW.index("dram__")], "profiled no kernel"),
    ],
)
def test_what_holds_no_kernel_is_refused(text: str, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        parse(text)


def test_without_any_metric_that_was_asked_for() -> None:
    text = '"ID","Kernel Name","other.sum"\n"","","inst"\n"0","k","7"\n'
    assert parse(text).evidence() == "Nsight Compute counts over 1 kernel: none of the metrics asked for"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_export_does_more_than_be_refused(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([RAW, DETAILS]))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    noise = data.draw(st.text(alphabet='",\n=ID0.5%a ', max_size=20))
    with contextlib.suppress(MeasurementError):
        assert parse(whole[:start] + noise + whole[end:]).total.count > 0


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1,234.5", 1234.5),
        ("1.234,5", 1234.5),
        ("1,234", 1234.0),
        ("1,234,567", 1234567.0),
        ("0,5", 0.5),
        ("12,5", 12.5),
        ("1.5", 1.5),
        ("1 234", 1234.0),
        ("1\u202f234,5", 1234.5),
        ("1'234", 1234.0),
        ("-3", -3.0),
        ("1e-3", 0.001),
        ("n/a", None),
        ("", None),
        ("nan", None),
        ("(256, 1, 1)", None),
        ("1.2.3", None),
    ],
)
def test_numbers(cell: str, value: float | None) -> None:
    assert number(cell) == value


@pytest.mark.parametrize("phase", PHASES)
def test_the_command_is_complete(phase: str) -> None:
    words = shlex.split(command("my models/llama", phase, Path("p q.jsonl")))
    assert words[0] == "ncu"
    after = words.index("autotune")
    assert words[after:] == ["autotune", "profile", "my models/llama", "--replay", phase, "--prompts", "p q.jsonl"]
    options = dict(itertools.pairwise(words[:after]))
    assert options["--nvtx-include"] == f"{RANGES[phase]}/"
    assert options["--metrics"].split(",") == list(METRICS)
    assert options["--page"] == "raw"
    assert {"--nvtx", "--csv"} <= set(words)


@pytest.mark.parametrize(("phase", "ranges"), [("prefill", ["autotune.prefill"]), ("decode", [*RANGES.values()])])
def test_a_replay_bears_the_phases_names(phase: str, ranges: list[str]) -> None:
    open_ = list[str]()

    class Named(FakeCuda):
        def range(self, name: str):
            open_.append(name)
            return super().range(name)

    model, ids = models.tiny("llama"), torch.tensor(models.token_prompts(1, 6))
    with device.stand_in(Named()) as fake:
        replay(model, ids, phase)
        assert fake.ranges[: len(ranges)] == ranges  # type: ignore[attr-defined]
        assert fake.waits >= 2  # type: ignore[attr-defined]
    assert open_ == fake.ranges  # type: ignore[attr-defined]
