"""Turns findings into a report's record: times in ms, sizes in bytes, ratios as fractions; None if not measured."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from ..machine.roofline import floor_s
from ..report import Report
from ..workload import METRIC_OF, PHASES, Phase
from . import device_record as device
from .advice import advise

if TYPE_CHECKING:
    from ..diagnose.costs import MemoryUse, Operator, Profile, ScalePoint
    from ..diagnose.diagnosis import Diagnosis
    from ..machine.hardware import Hardware
    from ..validate import Latency, Quality, Speedup
    from .contributions import Contribution
    from .findings import Findings
    from .plan import Trial
    from .sharing import Sharing

SCHEMA = 1


def report_of(findings: Findings) -> Report:
    """Make the report: all findings, under stable names."""
    after = findings.after or findings.before
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "created": findings.created,
        "replayed": None,
        "verdict": findings.verdict,
        "doubt": findings.doubt,
        "model": {"name": findings.model, "parameters": findings.parameters},
        "policy": {
            "name": findings.policy,
            "tier": findings.tier,
            "objective": findings.objective,
            "budget_s": findings.budget_s,
        },
        "workload": findings.workload,
        "prompt_tokens": after.prompt_tokens,
        "seconds": findings.seconds,
        "elsewhere": findings.elsewhere,
        "transforms": [str(t) for t in findings.transforms],
        "phases": {p: _phase(findings, p) for p in PHASES if p in findings.before.phases},
        "diagnoses_after": {p: _diagnosis(d) for p, d in findings.diagnoses_after.items()},
        "quality": _quality(findings.quality, findings.tier),
        "quality_detail": _quality_detail(findings.quality),
        "latency": _latency(findings.latency),
        "contributions": [_contribution(c) for c in findings.contributions],
        "trials": [_trial(t) for t in findings.trials],
        "operators": {
            p: _operators(findings.before, after, p, findings.hardware) for p in PHASES if p in findings.before.phases
        },
        "device": device.record(findings.before, findings.after),
        "ncu": {p: device.counted(reading) for p, reading in findings.ncu.items()},
        "batch_scaling": _scaling(findings.before.batch_scaling, after.batch_scaling),
        "context_growth": _scaling(findings.before.context_growth, after.context_growth),
        "callers": _callers(findings.sharing),
        "memory": {"before": _memory(findings.before.memory), "after": _memory(after.memory)},
        "bytes_after_release": None,
        "hardware": _hardware(findings.hardware),
        "break_even_tokens": findings.break_even_tokens,
        "served": 0,
        "bypassed": {},
        "advice": [asdict(advice) for advice in advise(findings)],
    }
    return Report({key: json_safe(value) for key, value in found.items()})


def reverified(
    report: Report,
    *,
    verdict: str,
    seconds: float,
    latency: Latency | None = None,
    quality: Quality | None = None,
    elsewhere: float | None = None,
) -> Report:
    """Update a report with what a replay measured. Profiles and trials stay those of the tuning.

    The verdict on quality also stays, because the tuning saw more tokens. The replay's is recorded beside it.
    """
    old = report.record
    new = dict(old) | {"verdict": verdict, "served": 0, "bypassed": {}, "bytes_after_release": None}
    new["replayed"] = {
        "seconds": seconds,
        "elsewhere": elsewhere,
        "tuned": old.get("created", ""),
        "quality": _quality(quality, quality.tier) | {"reason": quality.reason} if quality else None,
    }
    if latency is not None:
        new["latency"] = _latency(latency)
        new["phases"] = {p: {**figures, **_paired(latency, p)} for p, figures in old["phases"].items()}
    return Report({key: json_safe(value) for key, value in new.items()})


def json_safe(value: Any) -> Any:
    """Convert `value` to JSON's types: NaN and infinities become None, enums their value, other objects their text."""
    if isinstance(value, enum.Enum):
        return json_safe(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_safe(v) for v in value]
    return str(value)


def _phase(findings: Findings, phase: Phase) -> dict[str, Any]:
    before, diagnosis = findings.before.phases[phase], findings.diagnoses_before[phase]
    baseline_ms = final_ms = 1e3 * before.seconds
    if findings.after is not None:
        final_ms = 1e3 * findings.after.phases[phase].seconds
    figures = {
        **_diagnosis(diagnosis),
        "baseline_ms": baseline_ms,
        "final_ms": final_ms,
        "speedup": baseline_ms / final_ms,
        "speedup_low": None,
        "speedup_high": None,
    }
    if not findings.transforms:  # the original against itself: nothing to estimate
        unchanged = {"final_ms": baseline_ms, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
        return figures | unchanged
    return figures | (_paired(findings.latency, phase) if findings.latency else {})


def _paired(latency: Latency, phase: Phase) -> dict[str, Any]:
    """A phase's figures from paired timing. They replace those of two profiles taken at different times."""
    metric = METRIC_OF[phase]
    speedup: Speedup = getattr(latency, metric)
    figures = {"speedup": speedup.ratio, "speedup_low": speedup.low, "speedup_high": speedup.high}
    for typical in list(latency.buckets.values())[:1]:  # requests of other sizes take other times
        if (reference := typical.reference_s.get(metric)) and (candidate := typical.candidate_s.get(metric)):
            figures |= {"baseline_ms": 1e3 * median(reference), "final_ms": 1e3 * median(candidate)}
    return figures


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "bottleneck": diagnosis.bottleneck,
        "evidence": diagnosis.evidence,
        "ceiling": diagnosis.ceiling,
        "roofline_share": diagnosis.roofline_share,
    }


def _quality(quality: Quality | None, tier: str | None) -> dict[str, Any]:
    names = ("mean_kld", "p99_kld", "same_top", "ppl_ratio", "verdict")
    return {"tier": quality.tier if quality else tier} | {name: getattr(quality, name, None) for name in names}


def _quality_detail(quality: Quality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    bounds = ("mean_kld_high", "max_kld", "same_top_low", "ppl_ratio_high", "delta_p_rms")
    names = ("reason", *bounds, "tokens", "prompts", "strata")
    certainty = [asdict(found) for found in quality.certainty]
    return {name: getattr(quality, name) for name in names} | {"certainty": certainty}


def _latency(latency: Latency | None) -> dict[str, Any] | None:
    if latency is None:
        return None
    return {
        "verdict": latency.verdict,
        "reason": latency.reason,
        "end_to_end": _speedup(latency.end_to_end),
        "ttft": _speedup(latency.ttft),
        "tpot": _speedup(latency.tpot),
        "noise": latency.noise,
        "buckets": {b: {m: _speedup(s) for m, s in times.speedups.items()} for b, times in latency.buckets.items()},
        "samples": {
            b: {"reference_ms": _samples(times.reference_s), "candidate_ms": _samples(times.candidate_s)}
            for b, times in latency.buckets.items()
        },
        "warnings": latency.warnings,
    }


def _samples(raw_s: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Every sample by metric, to five significant digits: clocks are not finer."""
    return {metric: [float(f"{1e3 * s:.5g}") for s in samples] for metric, samples in raw_s.items()}


def _speedup(speedup: Speedup) -> dict[str, Any]:
    return {"ratio": speedup.ratio, "low": speedup.low, "high": speedup.high, "pairs": speedup.pairs}


def _contribution(found: Contribution) -> dict[str, Any]:
    latency = found.latency
    return {
        "transform": str(found.transform),
        "target": found.target,
        "speedup": _speedup(getattr(latency, METRIC_OF[found.target])) if latency else None,
        "end_to_end": _speedup(latency.end_to_end) if latency else None,
        "reason": found.reason,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    metric = METRIC_OF[trial.target]
    speedup: Speedup | None = getattr(trial.latency, metric, None)
    return {
        "candidate": trial.candidate,
        "transform": trial.transform.name,
        "phase": "both" if trial.target == "both" else trial.transform.phase,
        "params": trial.transform.params,
        "target": trial.target,
        "step": trial.step,
        "predicted": trial.predicted,
        "speedup": speedup.ratio if speedup else None,
        "speedup_low": speedup.low if speedup else None,
        "speedup_high": speedup.high if speedup else None,
        "ttft": _speedup(trial.latency.ttft) if trial.latency else None,
        "tpot": _speedup(trial.latency.tpot) if trial.latency else None,
        "outcome": trial.outcome,
        "reason": trial.reason,
        "seconds": trial.seconds,
        "compile_s": trial.compile_s,
        "quality": _quality(trial.quality, None) if trial.quality else None,
    }


def _operators(before: Profile, after: Profile, phase: Phase, hardware: Hardware) -> list[dict[str, Any]]:
    """One row per group, in the original's order, then new groups. A group that one side lacks took no time there."""
    dtype = before.phases[phase].compute_dtype
    old = {o.group: o for o in before.phases[phase].operators}
    new = {o.group: o for o in after.phases[phase].operators}
    total = sum(o.seconds for o in old.values())
    rows = []
    for group in dict.fromkeys((*old, *new)):
        was, now = old.get(group), new.get(group)
        rows.append({
            "group": group,
            "before_ms": 1e3 * was.seconds if was else 0.0,
            "share": was.seconds / total if was and total else 0.0,
            "bottleneck": was.bottleneck if was else "-",
            "flops": was.flops if was else 0.0,
            "moved_bytes": was.moved_bytes if was else 0.0,
            "roofline_share": _roofline_share(was, hardware, dtype) if was else None,
            "after_ms": 1e3 * now.seconds if now else 0.0,
            "after_bottleneck": now.bottleneck if now else "-",
            "after_flops": now.flops if now else 0.0,
            "after_moved_bytes": now.moved_bytes if now else 0.0,
        })  # fmt: skip
    return rows


def _roofline_share(operator: Operator, hardware: Hardware, dtype: str) -> float | None:
    """The operator's roofline floor as a share of its time; None if the floor or the time is zero."""
    floor = floor_s(
        operator.flops, operator.moved_bytes, hardware.peak_flops_per_s(dtype), hardware.bandwidth_bytes_per_s
    )
    return floor / operator.seconds if floor and operator.seconds else None


def _scaling(before: Sequence[ScalePoint], after: Sequence[ScalePoint]) -> list[dict[str, Any]]:
    later = {(p.batch, p.context): p for p in after}
    rows = []
    for point in before:
        now = later.get((point.batch, point.context))
        rows.append({
            "batch": point.batch,
            "context": point.context,
            "ms_per_step": 1e3 * point.seconds_per_step,
            "tokens_per_s": point.tokens_per_s,
            "after_ms_per_step": 1e3 * now.seconds_per_step if now else None,
            "after_tokens_per_s": now.tokens_per_s if now else None,
        })  # fmt: skip
    return rows


def _callers(sharing: Sharing | None) -> dict[str, Any] | None:
    if sharing is None:
        return None
    points = [
        {
            "callers": point.callers,
            "tokens_per_s": median(point.tokens_per_s),
            "ratio": median(point.ratios),
            "ratio_low": min(point.ratios),
            "ratio_high": max(point.ratios),
            "ttft_ms": 1e3 * median(point.ttft_s),
            "tpot_ms": 1e3 * median(point.tpot_s) if point.tpot_s else None,
            "prompt_tokens": point.prompt_tokens,
        }
        for point in sharing.points
    ]
    return {
        "reason": sharing.reason,
        "accepted": sharing.rows > 0,
        "rows": sharing.rows,
        "alone_tokens_per_s": median(sharing.alone_tokens_per_s) if sharing.points else None,
        "points": points,
        "differing": sharing.differing,
        "gap_ms": None if sharing.gap_s is None else 1e3 * sharing.gap_s,
        "long_prompt": sharing.long_prompt,
        "new_tokens": sharing.new_tokens,
        "reads_ms": {str(tokens): 1e3 * seconds for tokens, seconds in sharing.reads_s.items()},
        "steps_ms": {str(rows): 1e3 * seconds for rows, seconds in sharing.steps_s.items()},
    }


def _memory(use: MemoryUse) -> dict[str, int]:
    return {
        "weights_bytes": use.weights_bytes,
        "cache_bytes": use.cache_bytes,
        "activations_bytes": use.activations_bytes,
    }


def _hardware(hardware: Hardware) -> dict[str, Any]:
    return {
        "device": hardware.device,
        "name": hardware.name,
        "capability": hardware.capability,
        "threads": hardware.threads,
        "memory_bytes": hardware.memory_bytes,
        "bandwidth_bytes_per_s": hardware.bandwidth_bytes_per_s,
        "flops_per_s": dict(hardware.flops_per_s),
        "compiler": hardware.compiler,
        "versions": dict(hardware.versions),
        "measured": hardware.measured,
        "disturbed": hardware.disturbed,
    }
