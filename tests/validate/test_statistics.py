"""Bounds and verdicts on simulated numbers: no model, no clock."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autotune.validate import Verdict
from autotune.validate.limits import Limits
from autotune.validate.ratios import bounds, decide, pooled
from autotune.validate.statistics import cluster_means, median_bounds, spread
from autotune.validate.timing import Pair, Timing
from autotune.workload import Bucket
from benchmarks.prove.machines import B1, Machine, bimodal, drifting, heavy_tailed, periodic, stepping, throttled

B8 = Bucket(8, 64, 32)


def test_cluster_bootstrap_is_wider_than_one_that_takes_tokens_for_independent():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(16), 32)
    values = rng.normal(size=16)[clusters] + 0.1 * rng.normal(size=512)  # tokens of a prompt are alike
    by_prompt = cluster_means(values, clusters).std()
    by_token = cluster_means(values, np.arange(512)).std()
    assert by_prompt > 4 * by_token
    assert by_prompt == pytest.approx(1 / math.sqrt(16), rel=0.5)


def test_cluster_bootstrap_weighs_prompts_by_their_tokens():
    means = cluster_means(np.array([1.0, 1.0, 1.0, 5.0]), np.array([0, 0, 0, 1]), resamples=5000)
    assert set(np.round(np.unique(means), 6)) == {1.0, 2.0, 5.0}  # both prompts drawn once: (3 x 1 + 5) / 4


def test_cluster_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(32), 16)
    covered = 0
    for seed in range(200):
        values = rng.exponential(size=32)[clusters] + rng.normal(size=512) * 0.3
        covered += float(np.quantile(cluster_means(values, clusters, 500, seed), 0.95)) >= 1.0
    assert covered >= 0.87 * 200  # nominally 95 %; exponential clusters are skewed


@pytest.mark.parametrize("count", [5, 8, 25, 60])
def test_median_bounds_are_those_of_drawing(count):
    rng = np.random.default_rng(count)
    values = rng.normal(size=count)
    drawn = np.median(values[rng.integers(0, count, size=(20000, count))], axis=1)
    expected = np.quantile(drawn, [0.025, 0.975])
    assert median_bounds(values, 0.025) == pytest.approx(expected, abs=0.35 * values.std() / math.sqrt(count))


def test_median_bounds_cover_the_median():
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in (median_bounds(rng.normal(size=25), 0.025) for _ in range(1000))]
    assert 0.92 <= np.mean(inside) <= 0.98


def test_early_bounds_are_wider_than_final_ones():
    values = np.array([0.68, 0.70, 0.69, 0.72, 0.66])
    (early_low, early_high), (low, high) = bounds(values, early=True), bounds(values)
    assert early_low < low < 0.69 < high < early_high


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.2, 0.2], [0.4, 0.4], 0.3),  # both gain: their mean
        ([0.2, 0.2], [-0.1, -0.1], -0.1),  # one loses: the worst
        ([0.2, np.nan], [0.4, 0.6], 0.45),  # a dropped pair leaves the other bucket's turn
    ],
)
def test_pooling_buckets(first, second, expected):
    values = pooled({"a": {"tpot": np.array(first)}, "b": {"tpot": np.array(second)}}, "tpot")
    assert np.median(values) == pytest.approx(expected)


def test_spread_is_the_interquartile_range():
    assert spread(np.arange(101.0)) == 50


def share(verdict, count, seed=0, **options):
    race_options = {k: options.pop(k) for k in ("limits", "max_pairs") if k in options}
    machines = [Machine(seed + k, **options) for k in range(count)]
    found = [machine.race(noise=machine.noise_floor(), **race_options).verdict for machine in machines]
    return found.count(verdict) / count


MACHINES = [drifting, stepping, periodic, bimodal, heavy_tailed, throttled]


@pytest.mark.fault("B31")
def test_the_original_against_itself_is_hardly_ever_faster():
    assert share(Verdict.PASS, 500) <= 0.01


@pytest.mark.fault("B33", "B34")
@pytest.mark.parametrize("speed", MACHINES)
def test_no_odd_machine_makes_the_original_faster_than_itself(speed):
    assert share(Verdict.PASS, 100, speed=speed) <= 0.01


ANY_GAIN = Limits(min_gain=0.0, max_tpot_increase=1, max_ttft_increase=1, max_p90_increase=1)


def verdicts(count, limits, max_pairs, **machine):
    """Without a noise floor: the bounds alone decide."""
    return [Machine(k, **machine).race(limits=limits, max_pairs=max_pairs).verdict for k in range(count)]


@pytest.mark.parametrize("speed", [*MACHINES, lambda now, rng: 1.0])
def test_six_looks_with_no_least_gain_still_err_within_five_percent(speed):
    assert verdicts(150, ANY_GAIN, 100, speed=speed).count(Verdict.PASS) <= 0.05 * 150


@pytest.mark.fault("B32")
def test_a_change_of_five_percent_is_seen():
    assert verdicts(60, Limits(min_gain=0.0), 100, gain=1.05).count(Verdict.PASS) >= 0.8 * 60
    assert verdicts(60, Limits(min_gain=0.0), 100, gain=1 / 1.05).count(Verdict.FAIL) >= 0.8 * 60


@pytest.mark.fault("B42")
def test_thirty_null_candidates_confirmed_once_rarely_commit_any():
    commits = 0
    for family in range(20):
        winners = [k for k in range(30) if Machine(1000 * family + k).race().verdict is Verdict.PASS]
        commits += any(Machine(10**6 + 1000 * family + k).race().verdict is Verdict.PASS for k in winners)
    assert commits <= 0.05 * 20


@pytest.mark.fault("B33", "B34")
@pytest.mark.parametrize("speed", [*MACHINES, lambda now, rng: 1.0])
def test_a_clear_win_is_found_and_its_size_unbiased(speed):
    found = [Machine(k, gain=2.0, speed=speed).race() for k in range(50)]
    assert {f.verdict for f in found} <= {Verdict.PASS, Verdict.INCONCLUSIVE}
    assert np.median([f.tpot.ratio for f in found]) == pytest.approx(2.0, rel=0.05)


def test_a_clear_win_needs_few_pairs():
    found = [Machine(k, gain=2.0).race() for k in range(100)]
    assert all(f.verdict is Verdict.PASS for f in found)
    assert np.mean([f.tpot.pairs <= 8 for f in found]) >= 0.95


@pytest.mark.fault("B34")
def test_outliers_are_kept_in_the_samples():
    found = Machine(3, speed=heavy_tailed).race(max_pairs=25)
    (times,) = found.buckets.values()
    assert max(times.reference_s["tpot"] + times.candidate_s["tpot"]) > 5 * np.median(times.reference_s["tpot"])


def pairs(ratio=2.0, count=12, ttft_ratio=None, jitter=0.01, polluted=()):
    rng = np.random.default_rng(0)
    out = []
    for k in range(count):
        r, c = np.exp(jitter * rng.normal(size=2))
        t = ttft_ratio or ratio
        out.append(
            Pair(
                Timing(0.1 * r, 0.03 * r, (0.1 + 31 * 0.03) * r, "stolen" if k in polluted else ""),
                Timing(0.1 * c / t, 0.03 * c / ratio, (0.1 / t + 31 * 0.03 / ratio) * c),
            )
        )
    return out


@pytest.mark.fault("B36", "B39", "B40")
@pytest.mark.parametrize(
    ("samples", "options", "verdict", "words"),
    [
        ({"a": pairs(2.0)}, {}, Verdict.PASS, "x1.9"),
        ({"a": pairs(1.0)}, {}, Verdict.FAIL, "no gain of 3.0%"),
        ({"a": pairs(1.05)}, {"noise": 0.04}, Verdict.FAIL, "no gain of 8.0%"),  # within twice the noise
        ({"a": pairs(1.04, jitter=0.05)}, {}, Verdict.INCONCLUSIVE, "not clearly"),
        ({"a": pairs(2.0, ttft_ratio=1 / 1.4)}, {}, Verdict.FAIL, "ttft of a"),  # decode wins, first token loses
        ({"a": pairs(2.0), "b": pairs(0.8)}, {}, Verdict.FAIL, "of b"),  # wins at batch 1, loses at batch 8
        ({"a": pairs(2.0, polluted=range(5))}, {}, Verdict.INCONCLUSIVE, "5 of 12 pairs were disturbed"),
        ({"a": pairs(2.0, polluted=[1, 2])}, {}, Verdict.PASS, "in 10 pairs"),
        ({"a": pairs(2.0, count=3, polluted=[0, 1])}, {}, Verdict.INCONCLUSIVE, "fewer than 2"),
        ({"a": pairs(2.0, jitter=0.4)}, {}, Verdict.INCONCLUSIVE, "noisy"),
    ],
)
def test_verdicts(samples, options, verdict, words):
    found = decide(samples, "tpot", Limits(), options.get("noise", 0.0))
    assert found.verdict is verdict, found.reason
    assert words in found.reason


def test_the_worst_bucket_counts_where_buckets_disagree():
    found = decide({"a": pairs(2.0), "b": pairs(0.8)}, "tpot", Limits(), 0.0)
    assert found.tpot.ratio == pytest.approx(0.8, rel=0.02)
    assert found.buckets["a"].speedups["tpot"].ratio == pytest.approx(2.0, rel=0.02)


def test_one_token_has_no_time_per_further_token():
    single = [Pair(Timing(0.1, math.nan, 0.1), Timing(0.05, math.nan, 0.05))] * 6
    found = decide({"a": single}, "ttft", Limits(), 0.0)
    assert found.verdict is Verdict.PASS
    assert math.isnan(found.tpot.ratio)
    found = decide({"a": single}, "tpot", Limits(), 0.0)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "requests of one new token have no time between tokens" in found.reason


@pytest.mark.fault("B40")
def test_a_slow_bucket_is_not_averaged_away():
    machine = Machine(0, gain_at=lambda bucket: 3.0 if bucket.batch == 1 else 0.8)
    assert machine.race(buckets=(B1, B8)).verdict is Verdict.FAIL


def test_time_runs_out():
    found = Machine(0, gain=1.05).race(budget_s=5.0, max_pairs=1000)
    assert any("used up" in w for w in found.warnings)
    assert found.tpot.pairs < 10
