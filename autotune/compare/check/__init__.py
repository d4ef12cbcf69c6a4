"""Is a model still as good and as fast as when it was recorded? For CI and test suites.

    record(model, "baseline/", tokenizer=tok)          saves what a later check needs
    result = run(model, "baseline/", tokenizer=tok)    reports for each metric what changed, and where

Read in this order:

    recording -> compact, layers               what is recorded of a model
    baseline -> folder                         the baseline as values, and on disk
    checking -> examine -> localise            gives the recorded exam to another model, and finds where it differs
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
