"""NVIDIA's management library (NVML), read beside the work through `pynvml` (package nvidia-ml-py).

Each figure may be missing, forbidden, unsupported or broken, alone or together with all others. It is then reported as
"not available: why". Nothing raises. A thread asks the driver, and is given up if the driver does not answer in time.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import ending
from .counters import Counters, combine, unavailable

if TYPE_CHECKING:
    from .base import Address, Device

logger = logging.getLogger("autotune")

INTERVAL_S = 0.1  # seconds between readings; NVML itself averages over a sixth of a second to a second
PATIENCE_S = 5.0  # seconds to wait for an answer; the driver is loaded, because CUDA runs, so a slower one hangs
SILENT = f"NVML did not answer within {PATIENCE_S:.0f} s"
NOT_AVAILABLE = (2**32 - 1, 2**64 - 1)  # NVML's "no value" is all bits set
NO_VALUE = "the driver gives no value (N/A)"

REASONS = {  # bits of nvmlClocksEventReasons
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal (software)",
    0x040: "thermal (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
GPM = {"sm_active": 2, "sm_occupancy": 3, "tensor_active": 5, "dram_active": 10}  # nvmlGpmMetricId_t

_hung = threading.Event()  # a driver that did not answer once is not asked again


class Sampler:
    """Read counters while a block runs.

        with Sampler(address) as sampler:
            work()
        sampler.counters

    Args:
        address: the device's address, by which NVML finds it.
        interval_s: seconds between readings; one reading is always taken before the block.
        patience_s: seconds to wait for an answer.

    Attributes:
        counters: the readings; valid once the block has ended.
    """

    def __init__(self, address: Address, interval_s: float = INTERVAL_S, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self.interval_s = interval_s
        self.patience_s = patience_s
        self.counters = unavailable("nothing was sampled")
        self._stop = threading.Event()
        self._begun = threading.Event()
        self._done = threading.Event()

    def __enter__(self) -> Sampler:
        library = _library()
        if isinstance(library, str):
            self.counters = unavailable(library)
        elif _hung.is_set():
            self.counters = unavailable(SILENT)
        else:
            worker = ending.Worker(lambda: self._sample(library), "autotune NVML", stop=self._stop.set)
            try:
                launched = worker.launch()
            except ending.NoThreadError as error:
                launched, self.counters = False, unavailable(str(error))
            if launched:
                self._await(self._begun)
                return self
        self._done.set()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if not self._done.is_set():
            self._await(self._done)

    @property
    def reads(self) -> bool:
        """Whether readings are taken now."""
        return not (self._done.is_set() or self._stop.is_set() or _hung.is_set())

    def _await(self, event: threading.Event) -> None:
        if not _hung.is_set() and not event.wait(self.patience_s):
            _hung.set()
            logger.warning("%s; GPU counters are left out", SILENT)
        if _hung.is_set():
            self.counters = unavailable(SILENT)

    def _sample(self, library: Any) -> None:
        try:
            found = self._read(library)
        except Exception as error:  # a driver's library may raise anything
            found = unavailable(_why(error))
        finally:
            self._begun.set()
        if not _hung.is_set():
            self.counters = found
        self._done.set()

    def _read(self, library: Any) -> Counters:
        library.nvmlInit()
        try:
            handle = find(library, self.address)
            readings, missing = list[Mapping[str, Any]](), dict[str, str]()
            with _interval(library, handle) as metrics:
                readings.append(read(library, handle, missing))
                self._begun.set()
                while not self._stop.wait(self.interval_s):
                    readings.append(read(library, handle, missing))
                readings[0] = {**readings[0], **metrics(missing)}
            return combine(readings, missing)
        finally:
            with contextlib.suppress(Exception):  # its error must not hide another
                library.nvmlShutdown()


def sampled(device: Device) -> AbstractContextManager[Sampler | None]:
    """A sampler of the device's counters; none for a CPU."""
    address = device.address()
    return nullcontext() if address is None else Sampler(address)


def find(library: Any, address: Address) -> Any:
    """NVML's handle of a device, found by its address: NVML's own numbers do not follow CUDA_VISIBLE_DEVICES.

    A MIG instance has the PCI address of the whole GPU, which others use as well. So its UUID is tried first.
    """
    with contextlib.suppress(Exception):
        return library.nvmlDeviceGetHandleByUUID("MIG-" + address.uuid.removeprefix("GPU-").removeprefix("MIG-"))
    with contextlib.suppress(Exception):
        return library.nvmlDeviceGetHandleByPciBusId(address.pci)
    return library.nvmlDeviceGetHandleByUUID(address.uuid)


def read(library: Any, handle: Any, missing: dict[str, str]) -> dict[str, Any]:
    """Take one reading: figure -> value. For each figure without a value, write the reason into `missing`."""
    found = dict[str, Any]()
    for names, ask in _QUESTIONS.items():
        try:
            values = ask(library, handle)
        except Exception as error:  # one figure's error must not affect the others
            missing.update(dict.fromkeys(names, _why(error)))
            continue
        for name, value in zip(names, values, strict=True):
            if _is_value(value):
                found[name] = value
            else:
                missing[name] = NO_VALUE
    return found


def _utilization(nvml: Any, handle: Any) -> tuple[Any, ...]:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return _in_units(rates.gpu, 0.01), _in_units(rates.memory, 0.01)


def _clocks(kind: int) -> Callable[[Any, Any], tuple[Any, ...]]:
    def ask(nvml: Any, handle: Any) -> tuple[Any, ...]:
        return (
            _in_units(nvml.nvmlDeviceGetClockInfo(handle, kind), 1e6),
            _in_units(nvml.nvmlDeviceGetMaxClockInfo(handle, kind), 1e6),
        )

    return ask


def _lowered(nvml: Any, handle: Any) -> tuple[Any, ...]:
    # the function was renamed; drivers before 535 only know the old name
    ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    try:
        bits = ask(handle) if ask else nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except Exception:
        if not ask:
            raise
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return (tuple(name for bit, name in REASONS.items() if bits & bit),)


def _memory(nvml: Any, handle: Any) -> tuple[Any, ...]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return memory.used, memory.total


def _others(nvml: Any, handle: Any) -> tuple[Any, ...]:
    """Number and memory of other processes. In a container process ids differ: one of those listed is then this one."""
    listed = list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    others = [process for process in listed if process.pid != os.getpid()]
    unnamed = len(others) == len(listed) and bool(listed)
    sizes = [process.usedGpuMemory for process in others]
    known = None if unnamed or not all(map(_is_value, sizes)) else sum(sizes)
    return len(others) - unnamed, known


_QUESTIONS: Mapping[tuple[str, ...], Callable[[Any, Any], tuple[Any, ...]]] = {
    ("sm_utilization", "memory_utilization"): _utilization,
    ("sm_clock_hz", "sm_clock_max_hz"): _clocks(1),  # NVML_CLOCK_SM
    ("memory_clock_hz", "memory_clock_max_hz"): _clocks(2),  # NVML_CLOCK_MEM
    ("lowered",): _lowered,
    ("temperature_c",): lambda nvml, handle: (nvml.nvmlDeviceGetTemperature(handle, 0),),  # NVML_TEMPERATURE_GPU
    ("power_w",): lambda nvml, handle: (_in_units(nvml.nvmlDeviceGetPowerUsage(handle), 1e-3),),
    ("power_limit_w",): lambda nvml, handle: (_in_units(nvml.nvmlDeviceGetEnforcedPowerLimit(handle), 1e-3),),
    ("memory_used_bytes", "memory_total_bytes"): _memory,
    ("other_processes", "other_bytes"): _others,
    ("mig",): lambda nvml, handle: (bool(nvml.nvmlDeviceGetMigMode(handle)[0]),),
    # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC
    ("ecc_errors",): lambda nvml, handle: (nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0),),
}


@contextmanager
def _interval(nvml: Any, handle: Any) -> Iterator[Callable[[dict[str, str]], dict[str, float]]]:
    """Take a first GPM sample. The yielded function takes a second; GPM metrics are the difference of the two."""
    samples, failed = list[Any](), ""
    try:
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            failed = "GPM metrics need a Hopper GPU or a later one"
        else:
            samples += [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]
            nvml.nvmlGpmSampleGet(handle, samples[0])
    except Exception as error:
        failed = _why(error)

    def metrics(missing: dict[str, str]) -> dict[str, float]:
        try:
            if not failed:
                nvml.nvmlGpmSampleGet(handle, samples[1])
                return _difference(nvml, samples, missing)
            why = failed
        except Exception as error:
            why = _why(error)
        missing.update(dict.fromkeys(GPM, why))
        return {}

    try:
        yield metrics
    finally:
        for sample in samples:
            with contextlib.suppress(Exception):
                nvml.nvmlGpmSampleFree(sample)


def _difference(nvml: Any, samples: list[Any], missing: dict[str, str]) -> dict[str, float]:
    asked = nvml.c_nvmlGpmMetricsGet_t()
    asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = len(GPM)
    asked.sample1, asked.sample2 = samples
    for i, number in enumerate(GPM.values()):
        asked.metrics[i].metricId = number
    nvml.nvmlGpmMetricsGet(asked)
    found = dict[str, float]()
    for i, name in enumerate(GPM):
        metric = asked.metrics[i]
        if metric.nvmlReturn == 0 and _is_value(metric.value):
            found[name] = metric.value / 100
        else:
            missing[name] = f"GPM gives no value (NVML error {metric.nvmlReturn})"
    return found


def _library() -> Any:
    """The module pynvml, or why it cannot be used."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return "pynvml is not installed: pip install nvidia-ml-py"
    except Exception as error:  # packages may raise anything when imported
        return f"pynvml cannot be imported ({_why(error)})"


def _why(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_value(value: Any) -> bool:
    if isinstance(value, tuple | bool):
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0 and value not in NOT_AVAILABLE


def _in_units(value: Any, unit: float) -> float:
    """A driver's number in SI units. Raises ValueError if the number means "no value"."""
    if not _is_value(value):
        raise ValueError(NO_VALUE)
    return float(value * unit)
