"""What is measured of this machine is complete and consistent; how fast it is, no test may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune import device, hardware, peaks
from autotune.device import Identity
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


@pytest.mark.parametrize(("name", "found"), [("mycxx", True), ("absent", False)])
def test_the_compiler_of_the_environment_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: bool
) -> None:
    for program in ("mycxx", "g++"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", name)
    assert hardware.find_compiler() == str(tmp_path / (name if found else "g++"))


def test_no_compiler_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.find_compiler() is None


def test_an_unknown_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "OPTIONAL_LIBRARIES", {"nothing": "no-such-distribution"})
    assert "nothing" not in hardware.library_versions()


GPUS = [("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True), ("10.0", True), ("12.0", True)]


@pytest.mark.parametrize(("capability", "float8"), GPUS)
def test_a_gpus_peaks_are_measured_for_the_dtypes_it_has(capability: str, float8: bool) -> None:
    fake = FakeCuda(Identity("a GPU", capability, 2**34))
    found = peaks.matmul_peaks(fake)
    assert {"float32", "tf32", "bfloat16", "float16", "int8"} <= set(found)
    assert ("float8_e4m3fn" in found) == float8
    assert all(peak > 0 for peak in found.values())


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_measuring_leaves_the_precision_of_float32_as_it_was(before: str) -> None:
    setting, was = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        setting.fp32_precision = before
        peaks.matmul_peaks(FakeCuda())
        with peaks.float32_precision("tf32"):
            assert peaks.uses_tf32()
        assert setting.fp32_precision == before
        assert peaks.uses_tf32() == (before == "tf32")
    finally:
        setting.fp32_precision = was


def test_measuring_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, multiply = list[int](), torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(a.nbytes + b.nbytes)
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    fake = FakeCuda()
    peaks.matmul_peaks(fake)
    assert sizes
    assert max(sizes) <= fake.scratch_bytes()


def test_a_dtype_that_fails_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise NotImplementedError("no kernel image is available for this device")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert {"int8", "float8_e4m3fn"}.isdisjoint(peaks.matmul_peaks(FakeCuda()))


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_a_real_gpu_is_measured(index: int) -> None:
    found = hardware.probe(f"cuda:{index}")
    gpu = device.of(f"cuda:{index}")
    cache = torch.cuda.get_device_properties(index).L2_cache_size
    assert gpu.scratch_bytes() > 8 * cache, "too little memory is free: its cache would answer"
    assert 5e10 < found.bandwidth_bytes_per_s < 2e13
    assert found.flops_per_s["float16"] > found.flops_per_s["float32"]
    assert found.flops_per_s["tf32"] > found.flops_per_s["float32"]
    assert ("float8_e4m3fn" in found.flops_per_s) == (torch.cuda.get_device_capability(index) >= (8, 9))
