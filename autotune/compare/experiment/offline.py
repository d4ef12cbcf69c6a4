"""Runs an experiment on this machine now: first quality, then all arms in interleaved rounds, then the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from ...errors import DeviceError, MeasurementError, in_words
from ...machine import device as devices
from ...machine import outside
from ...machine.hardware import library_versions
from ...model.linear_layers import stored_bytes
from ...profile.survey import cache_bytes
from ...runtime.variant import Variant
from ...tune import codec, exams
from ...validate import Quality, Verdict, quality
from ...validate.exam import Exam
from ...validate.latency import noise_floor, timed
from ...validate.ratios import decide, failed
from ...validate.score import CandidateError, Served
from ...validate.timing import Clock, request
from ...workload import Bucket, Workload, built_in
from .arms import Arm, fit_prompts
from .given import CONTROL
from .results import Outcome, Result
from .rounds import Rounds
from .store import Observation, Version
from .verdicts import Terms, cells, chance, conclude, correct, weigh

if TYPE_CHECKING:
    from .setup import Setup

NOISE_SHARE = 0.1  # share of the budget for measuring the A/A noise


def run(experiment: Setup, *, budget_s: float, pairs: int, notify: Callable[[str], None], clock: Clock) -> Result:
    """Measure and judge; see `Experiment.run`."""
    arms, store = experiment.arms(notify), experiment.store
    prints = {arm.name: arm.fingerprint for arm in arms}
    version = store.begin(experiment.name, "offline", prints, _settings(experiment))
    if store.keep_prompts:
        prompts = map(store.prompt, experiment.bench().work.prompts)
        store.add_all(version, [Observation(CONTROL, "prompt", "", k, body) for k, body in enumerate(prompts)])
    notify(f"version {version.number}: {version.reason}")
    measured = _Offline(experiment, version, arms, experiment.bench().work, notify, clock).measure(budget_s, pairs)
    for outcome in measured.outcomes:
        store.conclude(version, outcome.name, outcome.verdict, outcome.reason, codec.encode(outcome))
    store.conclude(version, "", measured.verdict, measured.reason, codec.encode(measured))
    store.finish(version)
    return measured


class _Offline:
    """One run's measurements."""

    def __init__(
        self,
        experiment: Setup,
        version: Version,
        arms: tuple[Arm, ...],
        work: Workload,
        notify: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.experiment = experiment
        self.version = version
        self.arms = arms
        self.work = work
        self.notify = notify
        self.clock = clock
        self.store = experiment.store
        self.start_s = clock()
        self.variants = {arm.name: arm.variant for arm in arms if arm.variant is not None}
        self.buckets = work.buckets()
        self.pad = self.control.original.generation_config.pad_token_id or 0

    @property
    def control(self) -> Variant:
        return self.variants[CONTROL]

    def measure(self, budget_s: float, pairs: int) -> Result:
        qualities = self._qualities()
        timers = {name: timed(v, self._prompts(v), self.clock) for name, v in self.variants.items()}
        rounds = Rounds(self.store, self.version, timers, self.buckets, self.clock, self.notify)
        rounds.warm(0.0, budget_s)
        terms = Terms(self.experiment.objective, self.experiment.limits, self._noise(NOISE_SHARE * budget_s))
        rounds.time(pairs, terms, self.start_s + budget_s)
        outcomes = self._outcomes(rounds, terms, qualities, self._memories(rounds))
        verdict, reason = conclude(outcomes[1:])
        return Result(
            name=self.experiment.name,
            version=self.version.number,
            verdict=verdict,
            reason=reason,
            tier=self.experiment.tier,
            objective=self.experiment.objective,
            noise=terms.noise,
            outcomes=outcomes,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self.clock() - self.start_s,
            warnings=tuple(rounds.warnings),
        )

    def _qualities(self) -> dict[str, Quality]:
        """Judge every arm against the control's model as it is. Reuses results of an earlier run of this version."""
        found = {
            seen.arm: codec.decode(Quality, dict(seen.body), "quality")
            for seen in self.store.observations(self.version, "quality")
        }
        asked = [a for a in self.arms if a.variant is not None and a.unjudged is None and a.name not in found]
        if not self.control.transforms:
            asked = [arm for arm in asked if arm.name != CONTROL]  # it is the reference
        if not asked:
            return found
        exam = self._exam()
        for arm in asked:
            self.notify(f"judging the quality of {arm.name}")
            judged = found[arm.name] = self._judge(exam, arm)
            if judged.verdict is not Verdict.ERROR:  # an error may not happen in another run
                row = Observation(arm.name, "quality", "", 0, codec.encode(judged))
                self.store.add(self.version, row)
        return found

    def _exam(self) -> Exam:
        self.notify("collecting the control's answers to judge against")
        texts = built_in.natural(self.experiment.bench().tokenizer)
        prompts = exams.filled_up(self.work.prompts, texts)
        return Exam.prepare(
            self.control.original,
            prompts,
            size="quick",
            pad_token_id=self.pad,
            progress=lambda step, share: self.notify(step),
        )

    def _judge(self, exam: Exam, arm: Arm) -> Quality:
        tier = self.experiment.tier

        def told(step: str, share: float) -> None:
            self.notify(f"{arm.name}: {step}")

        try:
            return quality.judge(exam, self.variants[arm.name], tier, told)
        except DeviceError:
            raise
        except Exception as error:  # a candidate's failure must not stop the others
            outside.pass_on(error)
            why = in_words(error)
            return Quality(tier, Verdict.ERROR, why)

    def _noise(self, budget_s: float) -> float:
        """The A/A noise: the control's gain over itself, the largest of this run and earlier runs of this version."""
        self.notify("timing the control against itself")
        objective = self.experiment.objective
        prompts = self.work.prompts
        try:
            noise = noise_floor(
                self.control, self.buckets, prompts, objective=objective, clock=self.clock, budget_s=budget_s
            )
        except CandidateError as error:
            raise MeasurementError(f"the control itself failed: {error}") from error
        before = self.store.observations(self.version, "noise")
        if math.isfinite(noise):
            self.store.add(self.version, Observation(CONTROL, "noise", "", len(before), {"half_width": noise}))
        return max(noise, *(float(seen.body["half_width"]) for seen in before), 0.0)

    def _prompts(self, variant: Variant) -> tuple[tuple[int, ...], ...]:
        return fit_prompts(self.work, variant.original).prompts

    def _memories(self, rounds: Rounds) -> dict[str, tuple[float, float]]:
        found = {}
        for name in rounds.racing():
            try:
                found[name] = self._memory(self.variants[name])
            except CandidateError as error:
                rounds.fail(name, error)
        return found

    def _memory(self, variant: Variant) -> tuple[float, float]:
        """Bytes of the weights that serve, and the most memory held with the largest request.

        The second is measured on a GPU. On a CPU the system counts one peak for the whole process, so the weights and a
        full KV cache are added up instead.
        """
        weights = float(stored_bytes(*variant.modules.values()))
        device = variant.device
        batch, longest = max(self.work.batch_sizes), max(map(len, self.work.prompts))
        if device.asynchronous:
            device.trim()
            device.reset_peak()
            before = device.memory().used
            largest = Bucket(batch, longest, self.work.new_tokens)
            Served(variant, self.pad).generate(request(largest, self._prompts(variant), 0), largest.new_tokens)
            return weights, weights + max(0, device.memory().peak - before)
        return weights, weights + cache_bytes(variant, batch, longest + self.work.new_tokens)

    def _outcomes(
        self,
        rounds: Rounds,
        terms: Terms,
        qualities: Mapping[str, Quality],
        memory: Mapping[str, tuple[float, float]],
    ) -> tuple[Outcome, ...]:
        timed_arms = [arm.name for arm in self.arms if arm.name in memory and arm.name != CONTROL]
        pairs = {name: rounds.pairs(name) for name in timed_arms}
        latencies = {name: decide(pairs[name], terms.objective, terms.limits, terms.noise) for name in timed_arms}
        chances = {name: chance(pairs[name], terms) for name in timed_arms}
        corrected = correct(latencies, chances)
        outcomes = []
        for arm in self.arms:
            weights, peak = memory.get(arm.name, (math.nan, math.nan))
            known: dict[str, Any] = {"quality": qualities.get(arm.name), "stored_bytes": weights, "peak_bytes": peak}
            if arm.name == CONTROL:
                verdict, reason = Verdict.PASS, "what the candidates are compared with"
            elif arm.name not in latencies:
                why = arm.problem or rounds.failures.get(arm.name, "")
                verdict, reason, known["latency"] = Verdict.ERROR, why, failed(why, terms.noise)
            else:
                limit = terms.limits.max_memory_ratio
                verdict, reason = weigh(
                    corrected[arm.name], known["quality"], arm.unjudged, (peak, memory[CONTROL][1]), limit
                )
                known |= {"latency": latencies[arm.name], "p_value": chances[arm.name]}
                known["cells"] = cells(pairs[arm.name], terms)
            outcomes.append(
                Outcome(arm.name, arm.description, arm.fingerprint, verdict, reason, notes=arm.notes, **known)
            )
        return tuple(outcomes)


def _settings(experiment: Setup) -> dict[str, Any]:
    """Settings that observations depend on besides the arms, as plain JSON values. Prompts appear as hashes."""
    bench = experiment.bench()
    device = devices.of(bench.model).identity()
    return {
        "prompts": [experiment.store.prompt(prompt)["hash"] for prompt in bench.work.prompts],
        "new tokens": bench.work.new_tokens,
        "batch sizes": list(bench.work.batch_sizes),
        "tier": experiment.tier,
        "objective": experiment.objective,
        "limits": asdict(experiment.limits),
        "machine": f"{device.name}, {device.capability}, {torch.get_num_threads()} threads",
        "libraries": library_versions(),
    }
