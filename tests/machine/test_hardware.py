"""What is measured of this machine is complete and consistent; how fast it is, no test may say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.machine import busy, compilers, device, hardware, intraop, peaks
from autotune.machine.device import Identity
from autotune.runtime.traffic import Traffic
from tests.fakes.cuda import FakeCuda


@pytest.fixture(scope="module")
def here() -> hardware.Hardware:
    return hardware.probe()


def test_peaks_are_measured(here: hardware.Hardware) -> None:
    assert here.device == "cpu"
    assert here.measured
    assert here.threads == torch.get_num_threads()
    assert here.bandwidth_bytes_per_s > 0
    assert here.flops_per_s["float32"] > 0
    assert set(here.flops_per_s) <= {"float32", "bfloat16", "float16", "int8"}


def test_the_machine_is_named(here: hardware.Hardware) -> None:
    assert here.name
    assert here.capability
    assert here.memory_bytes > 2**28


def test_one_probe_a_process(here: hardware.Hardware) -> None:
    assert hardware.probe("cpu") is here


def test_versions_come_without_imports(here: hardware.Hardware) -> None:
    assert here.versions["torch"] == str(torch.__version__)
    assert "transformers" in here.versions


@pytest.mark.parametrize(("name", "found"), [("mycxx", True), ("absent", False), ('mycxx -DNAME="x', False)])
def test_the_compiler_of_the_environment_is_the_one_or_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: bool
) -> None:
    for program in ("mycxx", "g++"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", name)
    assert compilers.path() == (str(tmp_path / name) if found else None)


def test_no_compiler_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compilers.path() is None


def test_an_unknown_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "OPTIONAL_LIBRARIES", {"nothing": "no-such-distribution"})
    assert "nothing" not in hardware.library_versions()


GPUS = [("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True), ("10.0", True), ("12.0", True)]


@pytest.mark.parametrize(("capability", "float8"), GPUS)
def test_a_gpus_peaks_are_measured_for_the_dtypes_it_has(capability: str, float8: bool) -> None:
    fake = FakeCuda(Identity("a GPU", capability, 2**34))
    found = peaks.measure(fake).flops_per_s
    assert {"float32", "bfloat16", "float16", "int8"} <= set(found)
    assert ("float8_e4m3fn" in found) == float8
    assert all(peak > 0 for peak in found.values())


@pytest.mark.parametrize(("own", "measured"), [("none", "float32"), ("ieee", "float32"), ("tf32", "tf32")])
def test_fp32_is_measured_as_the_process_computes_it_and_no_setting_is_touched(
    own: str, measured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's settings are the whole process's: threads that compute meanwhile would meet another precision."""
    setting, before, written = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision, list[str]()
    try:
        setting.fp32_precision = own
        with monkeypatch.context() as patch:
            patch.setattr(type(setting), "__setattr__", lambda _, name, value: written.append(name))
            patch.setattr(torch, "set_float32_matmul_precision", lambda precision: written.append(precision))
            found = peaks.measure(FakeCuda()).flops_per_s
        assert {"float32", "tf32"} & set(found) == {measured}
        assert not written
        assert peaks.uses_tf32() == (own == "tf32")
    finally:
        setting.fp32_precision = before


def test_every_reading_of_a_peak_is_a_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, traffic, turns = FakeCuda(), Traffic(), list[bool]()
    seconds = fake.seconds
    monkeypatch.setattr(fake, "seconds", lambda work: turns.append(traffic._measuring is not None) or seconds(work))
    peaks.measure(fake, traffic.step)
    assert turns
    assert all(turns)


def test_measuring_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, multiply = list[int](), torch.nn.functional.linear

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(a.nbytes + b.nbytes)
        return multiply(a, b)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    fake = FakeCuda()
    peaks.measure(fake)
    assert sizes
    assert max(sizes) <= fake.scratch_bytes()


def test_peaks_are_of_matmuls_as_linear_layers_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP16 the other layout is ten times slower on a CPU without instructions for it."""
    operand = torch.arange(4, dtype=torch.float32, device="cpu").view(2, 2)
    monkeypatch.setattr(peaks, "_operand", lambda *_: operand)
    assert torch.equal(peaks._plain(torch.float32)(device.of("cpu"), 2)(), operand @ operand.t())


@pytest.mark.parametrize("scratch_bytes", [2**20, 2**23])
def test_a_cpu_shows_what_its_kernels_and_one_core_read(scratch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, threads = device.of("cpu"), list[int]()
    bandwidth = peaks._bandwidth
    monkeypatch.setattr(type(cpu), "scratch_bytes", lambda _: scratch_bytes)
    monkeypatch.setattr(peaks, "_bandwidth", lambda *a: threads.append(torch.get_num_threads()) or bandwidth(*a))
    with intraop.computing_with(2):
        found = peaks.measure(cpu)
    assert threads == [2, 2, 1]
    assert found.core_bytes_per_s > 0
    assert set(found.vector_bytes_per_s) == {name for name, peak in found.flops_per_s.items() if peak >= 1e9}
    assert all(rate > 0 for rate in found.vector_bytes_per_s.values())


def test_a_dtype_that_fails_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise NotImplementedError("no kernel image is available for this device")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert {"int8", "float8_e4m3fn"}.isdisjoint(peaks.measure(FakeCuda()).flops_per_s)


# bandwidth in two tries, FLOP/s in two tries, on a GPU or not -> how far the two are apart
TRIES = [
    ((10.0, 10.0), (5.0, 5.0), False, 0.0),
    ((10.0, 8.0), (5.0, 5.0), False, 0.2),
    ((8.0, 10.0), (5.0, 5.0), False, 0.2),
    ((10.0, 9.0), (2.0, 5.0), False, 0.6),
    ((8.0, 10.0), (2.0, 5.0), True, 0.0),  # its clocks were not up yet
    ((10.0, 8.0), (5.0, 4.5), True, 0.2),
]


@pytest.mark.parametrize(("reads", "matmuls", "gpu", "spread"), TRIES)
def test_a_peak_is_the_better_of_two_tries(
    reads: tuple[float, float],
    matmuls: tuple[float, float],
    gpu: bool,
    spread: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = FakeCuda() if gpu else device.of("cpu")
    read, multiply, sides = iter(reads), dict[str, Iterator[float]](), list[Sequence[int]]()

    def peak(_: device.Device, prepare: Any, turn: Any, tried: Sequence[int] = peaks.SIDES) -> tuple[float, int]:
        sides.append(tried)
        return next(multiply.setdefault(prepare, iter(matmuls))), 512

    monkeypatch.setattr(peaks, "_reads", lambda _: [])
    monkeypatch.setattr(peaks, "_bandwidth", lambda *_: next(read, 7.0))
    monkeypatch.setattr(peaks, "_peak", peak)
    found = peaks.measure(where)
    assert (found.bandwidth_bytes_per_s, set(found.flops_per_s.values())) == (max(reads), {max(matmuls)})
    assert found.spread == pytest.approx(spread)
    assert found.core_bytes_per_s == pytest.approx(nan if gpu else 7.0, nan_ok=True)
    assert set(sides) == {peaks.SIDES, (512,)}, "the second try repeats the size that was best"


MEASURED = peaks.Peaks(10.0, {"float32": 5.0}, 0.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[peaks.Peaks, float | None], None]:
    """Decides what the next measurement finds, and what others take meanwhile."""

    class Share(busy.Meter):
        def __init__(self) -> None: ...

    def found(measured: peaks.Peaks, elsewhere: float | None) -> None:
        monkeypatch.setattr(peaks, "measure", lambda *_: measured)
        monkeypatch.setattr(Share, "elsewhere", lambda _: elsewhere)

    monkeypatch.setattr(busy, "Meter", Share)
    monkeypatch.setattr(hardware, "UNEVEN", 0.2)
    monkeypatch.setattr(hardware, "_known", {})
    return found


DISTURBANCES = [
    (0.0, None, "cpu", False),
    (0.1, 0.01, "cpu", False),
    (0.3, None, "cpu", True),
    (0.0, 0.25, "cpu", True),
    (0.0, 0.25, "cuda", False),  # a GPU's peaks need no CPU
    (0.3, 0.0, "cuda", True),
]


@pytest.mark.parametrize(("spread", "elsewhere", "kind", "disturbed"), DISTURBANCES)
def test_others_at_work_and_uneven_tries_disturb(
    spread: float, elsewhere: float | None, kind: str, disturbed: bool, machine: Any
) -> None:
    machine(replace(MEASURED, spread=spread), elsewhere)
    with device.stand_in(FakeCuda()) if kind == "cuda" else nullcontext():
        assert hardware.probe().disturbed == disturbed


def test_what_was_disturbed_is_measured_again_when_tuning_begins(machine: Any) -> None:
    vectors = {"float32": 3.0, "bfloat16": 9.0}
    measured = replace(MEASURED, flops_per_s={"float32": 5.0, "bfloat16": 1.0}, vector_bytes_per_s=vectors)
    machine(replace(measured, core_bytes_per_s=6.0), 0.5)
    first = hardware.probe()
    assert first.disturbed
    machine(peaks.Peaks(9.0, {"float32": 7.0}, 0.0, {"float32": 4.0}, 2.0), 0.0)
    assert hardware.probe() is first
    second = hardware.probe(again=True)
    assert not second.disturbed
    assert (second.bandwidth_bytes_per_s, second.flops_per_s) == (10.0, {"float32": 7.0})
    assert (second.core_bytes_per_s, second.vector_bytes_per_s) == (6.0, {"float32": 4.0})
    machine(peaks.Peaks(99.0, {"float32": 99.0}, 0.0), 0.0)
    assert hardware.probe(again=True) is second


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_a_real_gpu_is_measured(index: int) -> None:
    found = hardware.probe(f"cuda:{index}")
    gpu = device.of(f"cuda:{index}")
    cache = torch.cuda.get_device_properties(index).L2_cache_size
    assert gpu.scratch_bytes() > 8 * cache, "too little memory is free: its cache would answer"
    assert 5e10 < found.bandwidth_bytes_per_s < 2e13
    assert found.flops_per_s["float16"] > found.flops_per_s["float32"]
    assert found.peak_flops_per_s("tf32") > found.flops_per_s["float32"]
    assert ("float8_e4m3fn" in found.flops_per_s) == (torch.cuda.get_device_capability(index) >= (8, 9))
