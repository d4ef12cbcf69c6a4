"""GPU counters from a fake NVML: each figure degrades by itself, nothing raises, nothing hangs."""

from __future__ import annotations

import math
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.machine import device
from autotune.machine.device import Address, nvml
from autotune.machine.device.counters import FIGURES, Counters, combine
from autotune.machine.device.nvml import Sampler, sampled
from tests.fakes.cuda import FakeCuda
from tests.fakes.nvml import OWN, PCI, UUID, FakeNvml, NVMLError, process
from tests.surroundings import without_threads

ADDRESS = Address(PCI, UUID)


@pytest.fixture(autouse=True)
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hung in one test is asked again in the next."""
    monkeypatch.setattr(nvml, "_hung", threading.Event())


def counted(monkeypatch: pytest.MonkeyPatch, fake: Any, address: Address = ADDRESS) -> Counters:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with Sampler(address, interval_s=1e-3) as sampler:
        pass
    return sampler.counters


def test_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    found = counted(monkeypatch, fake)
    assert found == Counters(
        sm_utilization=0.8,
        memory_utilization=0.4,
        sm_clock_hz=1.5e9,
        sm_clock_max_hz=1.98e9,
        memory_clock_hz=2.6e9,
        memory_clock_max_hz=2.619e9,
        lowered=("idle",),
        temperature_c=61,
        power_w=350.0,
        power_limit_w=700.0,
        memory_used_bytes=12 * 10**9,
        memory_total_bytes=80 * 10**9,
        other_processes=0,
        other_bytes=0,
        mig=False,
        ecc_errors=0,
        sm_active=0.38,
        sm_occupancy=0.25,
        tensor_active=0.02,
        dram_active=0.45,
        readings=found.readings,
        unavailable={},
    )
    assert found.readings >= 1
    assert found.warnings() == ()
    assert (fake.open, fake.sampled) == (0, 0), "NVML was left open, or GPM samples were not given back"


NOT_SUPPORTED, FORBIDDEN = NVMLError("Not Supported"), NVMLError("Insufficient Permissions")
LOST, TORN = NVMLError("GPU is lost"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
ALL = frozenset(FIGURES)
GPM = {"sm_active", "sm_occupancy", "tensor_active", "dram_active"}
FAILURES: list[tuple[str, FakeNvml, set[str] | frozenset[str], str]] = [
    ("no driver", FakeNvml(fails={"nvmlInit": NVMLError("Driver Not Loaded")}), ALL, "Driver Not Loaded"),
    ("no library", FakeNvml(fails={"nvmlInit": NVMLError("NVML Shared Library Not Found")}), ALL, "Not Found"),
    ("another version", FakeNvml(fails={"nvmlInit": NVMLError("RM has detected a mismatch")}), ALL, "mismatch"),
    ("no power", FakeNvml(fails={"nvmlDeviceGetPowerUsage": NOT_SUPPORTED}), {"power_w"}, "Not Supported"),
    ("no permission", FakeNvml(fails={"nvmlDeviceGetComputeRunningProcesses": FORBIDDEN}),
     {"other_processes", "other_bytes"}, "Insufficient Permissions"),
    ("no permission for GPM", FakeNvml(fails={"nvmlGpmSampleGet": FORBIDDEN}), GPM, "Insufficient Permissions"),
    ("before Hopper", FakeNvml({"nvmlGpmQueryDeviceSupport": SimpleNamespace(isSupportedDevice=0)}), GPM, "Hopper"),
    ("an old module", FakeNvml(lacks=["nvmlGpmQueryDeviceSupport"]), GPM, "has no attribute"),
    ("one metric fails", FakeNvml(gpm={2: 38.0, 3: 25.0, 5: None, 10: 45.0}), {"tensor_active"}, "error 3"),
    ("a metric is NaN", FakeNvml(gpm={2: 38.0, 3: math.nan, 5: 1.0, 10: 4.0}), {"sm_occupancy"}, "no value"),
    ("no ECC", FakeNvml(fails={"nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED}), {"ecc_errors"}, "Not Supported"),
    ("no MIG", FakeNvml(fails={"nvmlDeviceGetMigMode": NOT_SUPPORTED}), {"mig"}, "Not Supported"),
    ("MIG", FakeNvml({"nvmlDeviceGetMigMode": [1, 1]}, {"nvmlDeviceGetUtilizationRates": NOT_SUPPORTED}),
     {"sm_utilization", "memory_utilization"}, "Not Supported"),
    ("N/A as a number", FakeNvml({"nvmlDeviceGetPowerUsage": 2**64 - 1}), {"power_w"}, "N/A"),
    ("N/A as None", FakeNvml({"nvmlDeviceGetTemperature": None}), {"temperature_c"}, "N/A"),
    ("N/A as text", FakeNvml({"nvmlDeviceGetEnforcedPowerLimit": "N/A"}), {"power_limit_w"}, "N/A"),
    ("a broken answer", FakeNvml(fails={"nvmlDeviceGetMemoryInfo": TORN}),
     {"memory_used_bytes", "memory_total_bytes"}, "invalid start byte"),
    ("no clock reasons", FakeNvml(fails={
        "nvmlDeviceGetCurrentClocksEventReasons": NOT_SUPPORTED,
        "nvmlDeviceGetCurrentClocksThrottleReasons": NOT_SUPPORTED,
    }), {"lowered"}, "Not Supported"),
    ("another process's memory is hidden", FakeNvml({"nvmlDeviceGetComputeRunningProcesses": [OWN, process(9, None)]}),
     {"other_bytes"}, "N/A"),
]  # fmt: skip


@pytest.mark.fault("E72")
@pytest.mark.parametrize(("fake", "lost", "why"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES])
def test_what_fails_is_missing_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, lost: set[str], why: str
) -> None:
    found = counted(monkeypatch, fake)
    assert set(found.unavailable) == lost
    assert all(why in reason for reason in found.unavailable.values()), found.unavailable
    assert all((getattr(found, name) is None) == (name in lost) for name in FIGURES)
    assert (fake.open, fake.sampled) == (0, 0)


def test_a_gpu_that_is_lost_meanwhile_keeps_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with Sampler(ADDRESS, interval_s=1e-3) as sampler:
        fake.fails |= dict.fromkeys(fake.answers, LOST) | {"nvmlGpmSampleGet": LOST, "nvmlShutdown": LOST}
    assert sampler.counters.sm_utilization == 0.8
    assert set(sampler.counters.unavailable.values()) == {"GPU is lost"}
    assert set(sampler.counters.unavailable) == GPM


@pytest.mark.fault("E72")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch, None)  # None in sys.modules: the import fails
    assert set(found.unavailable.values()) == {"pynvml is not installed: pip install nvidia-ml-py"}
    assert found.evidence() == ""
    assert found.warnings() == ()


def test_a_package_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with Sampler(ADDRESS) as sampler:
        pass
    assert all("cannot open shared object" in why for why in sampler.counters.unavailable.values())


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetMemoryInfo", "nvmlGpmMetricsGet", "nvmlShutdown"])
def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    fake = FakeNvml(hangs=[function])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with Sampler(ADDRESS, patience_s=0.05) as sampler:
        pass
    assert set(sampler.counters.unavailable.values()) == {nvml.SILENT}
    before = list(fake.calls)
    with Sampler(ADDRESS, patience_s=0.05) as again:
        assert not again.reads
    assert set(again.counters.unavailable.values()) == {nvml.SILENT}
    assert fake.calls == before, "a driver that hangs was asked again"
    fake.release()


def test_where_no_thread_can_be_started_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    without_threads(monkeypatch)
    with Sampler(ADDRESS) as sampler:
        assert not sampler.reads
    assert set(sampler.counters.unavailable.values()) == {"can't start new thread"}


def test_the_device_is_found_by_its_address_and_not_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    assert counted(monkeypatch, fake, Address(PCI, "GPU-x")).sm_utilization == 0.8
    assert counted(monkeypatch, fake, Address("00000000:99:00.0", UUID)).sm_utilization == 0.8
    assert "nvmlDeviceGetHandleByIndex" not in fake.calls
    unknown = counted(monkeypatch, fake, Address("00000000:99:00.0", "GPU-x"))
    assert set(unknown.unavailable.values()) == {"Not Found"}


@pytest.mark.parametrize("uuid", [UUID, UUID.replace("GPU-", "MIG-")])
def test_an_instance_of_a_divided_gpu_is_not_taken_for_the_whole(uuid: str) -> None:
    instance = UUID.replace("GPU-", "MIG-")
    fake = FakeNvml(known=(PCI, UUID, instance))
    assert nvml.find(fake, Address(PCI, uuid)) == instance
    assert nvml.find(FakeNvml(), Address(PCI, uuid)) == PCI


def test_a_driver_from_before_the_new_name_tells_its_reasons_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for fake in (
        FakeNvml(lacks=["nvmlDeviceGetCurrentClocksEventReasons"]),
        FakeNvml(fails={"nvmlDeviceGetCurrentClocksEventReasons": NVMLError("Function Not Found")}),
    ):
        assert counted(monkeypatch, fake).lowered == ("power cap",)


PROCESSES = [
    ([OWN], 0, 0),
    ([], 0, 0),
    ([OWN, process(7, 5 * 10**9), process(8, 10**9)], 2, 6 * 10**9),
    ([process(7, 5 * 10**9)], 0, None),  # a container: one of them is this process under another number
    ([process(7, 5 * 10**9), process(8, 10**9)], 1, None),
]


@pytest.mark.parametrize(("listed", "others", "size"), PROCESSES)
def test_other_processes(monkeypatch: pytest.MonkeyPatch, listed: list[Any], others: int, size: int | None) -> None:
    found = counted(monkeypatch, FakeNvml({"nvmlDeviceGetComputeRunningProcesses": listed}))
    assert (found.other_processes, found.other_bytes) == (others, size)


def test_readings_are_combined() -> None:
    found = combine(
        [
            {"sm_utilization": 0.5, "temperature_c": 60, "lowered": ("idle",), "ecc_errors": 0},
            {"sm_utilization": 1.0, "temperature_c": 70, "lowered": ("power cap", "idle")},
            {"temperature_c": 65, "lowered": ()},
        ],
        {"power_w": "Not Supported"},
    )
    assert found.sm_utilization == 0.75  # of the readings that have it
    assert (found.temperature_c, found.ecc_errors, found.readings) == (70, 0, 3)
    assert found.lowered == ("idle", "power cap")
    assert found.unavailable["power_w"] == "Not Supported"


WARNINGS = [
    (Counters(lowered=("idle", "application clocks")), []),
    (Counters(lowered=("power cap",)), ["the GPU's clocks were lowered: power cap"]),
    (
        Counters(lowered=("thermal (hardware)", "power cap"), sm_clock_hz=1.2e9, sm_clock_max_hz=1.98e9),
        ["the GPU's clocks were lowered (1200 of 1980 MHz): thermal (hardware), power cap"],
    ),
    (
        Counters(other_processes=1, other_bytes=5 * 10**9),
        ["another process computes on the GPU with 5 GB: its figures are theirs, too"],
    ),
    (Counters(other_processes=3), ["3 other processes compute on the GPU: its figures are theirs, too"]),
    (Counters(ecc_errors=2), ["the GPU counts 2 uncorrected memory errors"]),
]


@pytest.mark.parametrize(("counters", "said"), WARNINGS)
def test_what_makes_figures_doubtful_is_a_warning(counters: Counters, said: list[str]) -> None:
    assert list(counters.warnings()) == said


def test_a_cpu_has_no_counters_and_no_thread() -> None:
    before = threading.active_count()
    with sampled(device.of("cpu")) as sampler:
        assert sampler is None
        assert threading.active_count() == before


def test_a_gpus_readings_are_taken_while_the_work_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, took = FakeNvml(), threading.Event()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    reading = fake.nvmlDeviceGetUtilizationRates

    def rates(handle: Any) -> Any:
        if fake.calls.count("nvmlDeviceGetUtilizationRates") >= 2:
            took.set()
        return reading(handle)

    monkeypatch.setattr(fake, "nvmlDeviceGetUtilizationRates", rates, raising=False)
    with device.stand_in(FakeCuda()) as gpu, Sampler(gpu.address() or ADDRESS, interval_s=1e-3) as sampler:
        assert sampler.reads
        assert took.wait(10), "only one reading was taken"
    assert sampler.counters.readings >= 3
    assert not sampler.reads


@pytest.mark.gpu
def test_a_real_gpu_is_read() -> None:
    with sampled(device.of("cuda")) as sampler:
        torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
    assert sampler is not None
    found = sampler.counters
    if "sm_utilization" not in found.unavailable:
        total = torch.cuda.get_device_properties("cuda").total_memory
        assert found.memory_total_bytes == pytest.approx(total, rel=0.1), "another device was read"
    assert all(found.unavailable.values())
