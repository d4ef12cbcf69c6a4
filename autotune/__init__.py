"""autotune makes a live Hugging Face causal LM faster without making it worse, and proves both.

Read in this order:

    wrap -> route -> variant        the model object, its interception, copy-on-write variants
    workload, hardware              what it is asked to do, and what the machine can do
    profile -> roofline -> diagnose what each phase costs, and what limits it
    policy -> transforms            what to try when
    validate                        quality first, then paired latency
    tune                            the loop: profile, diagnose, propose, try, validate, commit
    plan, report                    what is kept, and what is shown
"""

from __future__ import annotations

from .errors import (
    AutotuneError,
    MeasurementError,
    PlanError,
    PolicyError,
    StateError,
    TransformError,
    UnsupportedModelError,
    VariantError,
    WorkloadError,
)
from .plan import Plan
from .policy import Policy
from .transforms import Transform
from .workload import Workload
from .wrap import Handle, Status, unsupported, wrap

__version__ = "0.1.0"

__all__ = [
    "AutotuneError",
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
