"""Is a model still as good and as fast as when it was recorded? For CI and test suites.

    record(model, "baseline/", tokenizer=tok)          keeps what a later check needs
    result = run(model, "baseline/", tokenizer=tok)    says per metric what changed, and where

Read in this order:

    recording -> compact, layers               what is kept of a model
    baseline -> folder                         as values, and on disk
    checking -> examine -> localise            the recorded exam put to another model, and where it differs
    pace, tasks, harness                       latency against recorded samples; labelled tasks
    result -> render                           verdicts as values, Markdown and JUnit XML
"""

from __future__ import annotations

from .baseline import Baseline
from .checking import run
from .folder import load
from .recording import record
from .result import CheckResult, Metric

__all__ = ["Baseline", "CheckResult", "Metric", "load", "record", "run"]
