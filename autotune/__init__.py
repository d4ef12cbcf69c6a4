"""autotune makes a live Hugging Face causal LM faster without making it worse, and proves both.

    observe -> profile -> diagnose -> propose -> try -> validate -> commit -> watch

The folders are floors: each imports only from floors below it, and folders on one floor do not know each other.

    cli                    commands
    serve                  an OpenAI-compatible server, and plans rolled out over its replicas
    live, compare          a wrapped model in service and under watch; experiments and regression checks
    tune                   the loop: propose, try, commit; policies, plans, what a search found
    validate               is it no worse, and is it faster? Verdicts with numbers
    profile, transforms    what each phase costs, measured; one file an optimisation
    runtime                what serves: variants, decoding loop, caches, decode steps, kernels
    diagnose               what a phase costs and what limits it (pure)
    model, report          a model as it is found, and the seam to transformers; records shown
    workload               prompts, and how they are asked
    machine                processor, GPUs, the process
    errors                 everything that is raised on purpose

Each folder's docstring says what lives in it. To understand the loop read tune/run, tune/search and tune/trying; to
understand a call read live/serving, runtime/dispatch and runtime/loop.
"""

from __future__ import annotations

from .machine import spinning  # noqa: F401  # before anything imports torch

# isort: split
from .compare.experiment import Experiment
from .errors import (
    AutotuneError,
    DeviceError,
    ExperimentError,
    MeasurementError,
    PlanError,
    PolicyError,
    StateError,
    TransformError,
    UnsupportedModelError,
    VariantError,
    WorkloadError,
)
from .live.handle import Handle
from .live.status import Status
from .live.wrap import wrap
from .runtime.variant import Transform
from .tune.plan import Plan
from .tune.policy import Policy
from .tune.supported import unsupported
from .workload import Workload

__version__ = "0.1.0"

__all__ = [
    "AutotuneError",
    "DeviceError",
    "Experiment",
    "ExperimentError",
    "Handle",
    "MeasurementError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "StateError",
    "Status",
    "Transform",
    "TransformError",
    "UnsupportedModelError",
    "VariantError",
    "Workload",
    "WorkloadError",
    "unsupported",
    "wrap",
]
