"""A `pynvml` without a driver behind it: every function answers from a table, or fails as it was told to.

    nvml = FakeNvml(fails={"nvmlDeviceGetPowerUsage": NVMLError("Not Supported")})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

Functions and structures are those of nvidia-ml-py that autotune calls; values are round numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

PCI, UUID = "00000000:65:00.0", "GPU-00000000-1111-2222-3333-444444444444"


class NVMLError(Exception):
    """What pynvml raises; its text is NVML's ("Not Supported", "GPU is lost", ...)."""


def process(pid: int, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


OWN = process(os.getpid(), 10 * 10**9)
ANSWERS: Mapping[str, Any] = {
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=80, memory=40),
    "nvmlDeviceGetClockInfo": {1: 1500, 2: 2600},
    "nvmlDeviceGetMaxClockInfo": {1: 1980, 2: 2619},
    "nvmlDeviceGetCurrentClocksEventReasons": 0x001,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x004,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetPowerUsage": 350_000,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=12 * 10**9, total=80 * 10**9, free=68 * 10**9),
    "nvmlDeviceGetComputeRunningProcesses": [OWN],
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlGpmQueryDeviceSupport": SimpleNamespace(isSupportedDevice=1),
}
GPM = {2: 38.0, 3: 25.0, 5: 2.0, 10: 45.0}  # SM activity, occupancy, tensor cores, DRAM; percent


class FakeNvml(ModuleType):
    """The module.

    Args:
        answers: function -> value, or a list of values of which each call takes the next, the last one for good.
        fails: function -> the error it raises.
        lacks: functions that this version of the module does not have.
        hangs: functions that never return (until `release`).
        gpm: GPM metric number -> percent, None where the metric has an error of its own.
        known: PCI addresses and UUIDs of devices.

    Attributes:
        calls: names of the functions called, in order.
        sampled: GPM samples taken and not given back.
    """

    NVML_GPM_METRICS_GET_VERSION = 1
    NVMLError = NVMLError

    def __init__(
        self,
        answers: Mapping[str, Any] | None = None,
        fails: Mapping[str, Exception] | None = None,
        lacks: Sequence[str] = (),
        hangs: Sequence[str] = (),
        gpm: Mapping[int, float | None] = GPM,
        known: Sequence[str] = (PCI, UUID),
    ) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.answers = {**ANSWERS, **(answers or {})}
        self.fails = dict(fails or {})
        self.lacks = lacks
        self.hangs = hangs
        self.gpm = gpm
        self.known = known
        self.calls = list[str]()
        self.open = self.sampled = 0
        self._released = threading.Event()

    def release(self) -> None:
        """Let what hangs return."""
        self._released.set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name in self.__dict__.get("lacks", ()):
            raise AttributeError(f"module 'pynvml' has no attribute '{name}'")

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if name in self.hangs:
                self._released.wait()
            if name in self.fails:
                raise self.fails[name]
            return self._answer(name, args)

        return call

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        empty = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(98)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=empty)

    def _answer(self, name: str, args: tuple[Any, ...]) -> Any:
        match name:
            case "nvmlInit" | "nvmlShutdown":
                self.open += 1 if name == "nvmlInit" else -1
                return None
            case "nvmlDeviceGetHandleByPciBusId" | "nvmlDeviceGetHandleByUUID":
                if args[0] not in self.known:
                    raise NVMLError("Not Found")
                return args[0]
            case "nvmlGpmSampleAlloc":
                self.sampled += 1
                return SimpleNamespace(taken=0)
            case "nvmlGpmSampleFree":
                self.sampled -= 1
                return None
            case "nvmlGpmSampleGet":
                args[1].taken = len(self.calls)
                return args[1]
            case "nvmlGpmMetricsGet":
                return self._metrics(args[0])
        answer = self.answers[name]
        if isinstance(answer, dict):
            return answer[args[1]]
        if isinstance(answer, list) and name != "nvmlDeviceGetComputeRunningProcesses" and "Mig" not in name:
            return answer.pop(0) if len(answer) > 1 else answer[0]
        return answer

    def _metrics(self, asked: SimpleNamespace) -> SimpleNamespace:
        if not 0 < asked.sample1.taken < asked.sample2.taken:
            raise NVMLError("Invalid Argument")  # the first sample must be the older one
        for metric in asked.metrics[: asked.numMetrics]:
            value = self.gpm.get(metric.metricId)
            metric.nvmlReturn, metric.value = (3, 0.0) if value is None else (0, value)
        return asked
