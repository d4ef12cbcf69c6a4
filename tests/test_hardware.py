"""What is measured of this machine is complete and consistent; how fast it is, no test may say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune import hardware


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
