"""autotune makes a live Hugging Face causal LM faster without making it worse, and proves both.

    observe -> profile -> diagnose -> propose -> try -> validate -> commit -> watch

Read in this order:

    tune -> search -> bench           the loop: its frame, its decisions (pure), its measurements
    contributions                     what each transform of a plan brings, by leaving it out
    verdict                           what a search came to: a sentence, worth keeping or not (pure)
    sensitivity                       the layers that make a scheme fail the gate, and what to try without them
    wrap -> handle -> route           the model object: its life, its interception
    again                             when a search that noise may have misled is repeated
    variant                           copy-on-write: one way to run the model
    traffic, revision, original       measuring between live requests; noticing changes; where the original is
    stateful                          what a model's forward writes by itself: shared by all who serve it
    ending, outside                   how threads end with the process; exceptions that are the user's own
    watch -> canary, drift, breaker   after commit: is it still as good and as fast? out and back
    workload, hardware, device        what it is asked to do, what the machine can do, where CPU and GPU differ
    busy                              what others took of the machine meanwhile
    profile -> roofline -> diagnose   what each phase costs, what limits it, how much faster it could be
    machines                          other processors and GPUs by their data sheets, for the report's advice
    policy -> transforms              what to try when; one file an optimisation
    loop, cache, compiled, kernels    what the transforms put in: decoding loop, slots, compiled step, C++ operators
    validate                          quality first, then paired latency
    experiment                        candidates against a control: offline, in shadow, on a share of live traffic
    plan -> store, fingerprint        what is kept, where, and what it is valid for
    references                        what the original said in exams, kept between runs
    seam                              the only place that names what is inside transformers
    versions -> selfcheck, shrink     releases that were tested, and a check of others on a tiny model
    rehearsal                         what an architecture does not bear, found out on a tiny model of its class
    report, cli                       what is shown
"""

from __future__ import annotations

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
