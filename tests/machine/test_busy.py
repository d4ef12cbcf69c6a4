"""What others took of the CPUs, calculated from made-up readings and read from made-up /proc and control groups."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.machine import busy
from autotune.machine.busy import CpuCounters

START = CpuCounters(clock_s=100.0, cpus=2, used_s=1000.0, own_s=50.0)
TICKS = os.sysconf("SC_CLK_TCK")

# what happened in ten seconds on two CPUs -> share of the CPU time that went elsewhere
SHARES = {
    "idle": ({"used_s": 1000.0, "own_s": 50.0}, 0.0),
    "only this process": ({"used_s": 1020.0, "own_s": 70.0}, 0.0),
    "one core taken": ({"used_s": 1020.0, "own_s": 60.0}, 0.5),
    "everything taken": ({"used_s": 1020.0, "own_s": 50.0}, 1.0),
    "others, and time to spare": ({"used_s": 1006.0, "own_s": 52.0}, 0.2),
    "ticks that do not quite agree": ({"used_s": 1009.9, "own_s": 60.0}, 0.0),
    "more than there is": ({"used_s": 1030.0, "own_s": 60.0}, 0.5),
    "counters that show zeros": ({"used_s": 1000.0, "own_s": 60.0}, None),
    "nothing known of others": ({"used_s": None, "own_s": 60.0}, None),
    "nothing known of this process": ({"used_s": 1020.0, "own_s": None}, None),
    "no time passed": ({"clock_s": 100.0, "used_s": 1020.0, "own_s": 60.0}, None),
}


@pytest.mark.parametrize(("after", "share"), SHARES.values(), ids=SHARES)
def test_what_others_took_is_what_all_took_less_our_own(after: dict[str, float], share: float | None) -> None:
    assert busy.elsewhere(START, replace(START, **{"clock_s": 110.0} | after)) == (share and pytest.approx(share))


# sixteen CPUs for ten seconds, and what a control group allows -> share of what this process could have used
GROUPS = {
    "others use what the quota keeps from us": ({"quota": 4.0, "used_s": 1120.0, "own_s": 50.0}, 0.0),
    "and some of the rest": ({"quota": 4.0, "used_s": 1140.0, "own_s": 60.0}, 0.25),
    "throttled by what others in the group used": ({"quota": 4.0, "own_s": 70.0, "throttled_s": 10.0}, 0.25),
    "throttled for having used it up": ({"quota": 4.0, "own_s": 90.0, "throttled_s": 30.0}, 0.0),
    "throttled for more than was left": ({"quota": 4.0, "own_s": 80.0, "throttled_s": 30.0}, 0.25),
    "stalled": ({"own_s": 60.0, "used_s": 1010.0, "stalled_s": 4.0}, 0.025),
}


@pytest.mark.parametrize(("after", "share"), GROUPS.values(), ids=GROUPS)
def test_a_quota_is_what_can_be_used_and_nobody_loses_what_it_used_itself(
    after: dict[str, float], share: float
) -> None:
    before = replace(START, cpus=16, throttled_s=0.0, stalled_s=0.0)
    assert busy.elsewhere(before, replace(before, clock_s=110.0, **after)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("share", "worth_a_word"), [(None, False), (0.0, False), (0.04, False), (0.05, True), (1.0, True)]
)
def test_what_daemons_take_is_not_worth_a_word(share: float | None, worth_a_word: bool) -> None:
    assert busy.is_noticeable(share) == worth_a_word


def stat(spent: list[int], name: str = "python") -> str:
    """/proc/PID/stat with utime, stime, cutime and cstime in ticks."""
    return f"7 ({name}) R 1 1 1 0 -1 4194304 1 1 0 0 {' '.join(map(str, spent))} 20 0 1 0 1\n"


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)


FAMILY = {
    "stat": "cpu 9 9 9 9 9 9 9 9 0 0\n"
    "cpu0 100 20 30 4000 50 6 7 8 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\ncpu2 200 0 0 4000 0 0 0 0 0 0\nintr 1\n",
    "self/stat": stat([10, 5, 3, 2], "a name) with (brackets"),
    "self/task/1/children": "40 41",
    "self/task/2/children": "",
    "40/stat": stat([100, 0, 0, 0]),
    "40/task/40/children": "42 ",
    "41/stat": stat([0, 1000, 0, 0]),
    "42/stat": stat([0, 0, 7, 0]),
}


def test_a_process_is_counted_with_all_that_it_started(tmp_path: Path, two_cpus: None) -> None:
    found = busy.read(written(tmp_path, FAMILY), tmp_path / "none", clock=lambda: 5.0)
    assert (found.clock_s, found.cpus, found.quota) == (5.0, 2, math.inf)
    assert found.used_s == pytest.approx((100 + 20 + 30 + 8 + 200) / TICKS)  # no idle, waiting or interrupts
    assert found.own_s == pytest.approx((20 + 100 + 1000 + 7) / TICKS)
    assert found.throttled_s is None
    assert found.stalled_s is None


BROKEN = {
    "no /proc": {},
    "a CPU is missing": {"stat": "cpu0 1 1 1 1 1 1 1 1 0 0\n", "self/stat": stat([1, 1, 1, 1])},
    "an old kernel's": {"stat": "cpu0 1 1 1 1\ncpu2 1 1 1 1\n", "self/stat": stat([1, 1, 1, 1])},
    "words for numbers": {"stat": "cpu0 a b c d e f g h\n", "self/stat": stat([1, 1, 1, 1])},
    "a strange control group": FAMILY | {"self/cgroup": "nonsense\n"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_not_known(files: dict[str, str], tmp_path: Path, two_cpus: None) -> None:
    found = busy.read(written(tmp_path, files), tmp_path / "none", clock=lambda: 5.0)
    assert (found.cpus, found.used_s) == (2, None)
    assert busy.elsewhere(found, replace(found, clock_s=6.0)) is None


# /proc/self/cgroup, files of control groups -> quota, throttled_s, stalled_s
CONTROL = {
    "version 2, in a container": (
        "0::/\n",
        {
            "cpu.stat": "usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\n",
            "cpu.max": "150000 100000\n",
            "cpu.pressure": "some avg10=1.00 total=7\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=4000000\n",
        },
        (1.5, 2.5, 4.0),
    ),
    "version 2, the outer one has the limit": (
        "0::/user.slice/a.scope\n",
        {
            "cpu.stat": "usage_usec 9\n",
            "user.slice/cpu.stat": "throttled_usec 1000000\n",
            "user.slice/cpu.max": "50000 100000\n",
            "user.slice/a.scope/cpu.stat": "throttled_usec 0\n",
            "user.slice/a.scope/cpu.max": "max 100000\n",
        },
        (0.5, 1.0, None),
    ),
    "version 2, a path of the host's": (
        "0::/docker/abc\n",
        {"cpu.stat": "throttled_usec 0\n", "cpu.max": "max 100000\n"},
        (math.inf, 0.0, None),
    ),
    "version 1": (
        "3:memory:/x\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        {
            "cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 3000000000\n",
            "cpu/cpu.cfs_quota_us": "300000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        (3.0, 3.0, None),
    ),
    "version 1, no limit": (
        "1:cpu:/\n",
        {
            "cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        (math.inf, 0.0, None),
    ),
}


@pytest.mark.parametrize(("own", "files", "told"), CONTROL.values(), ids=CONTROL)
def test_limits_are_those_of_the_control_group_and_those_around_it(
    own: str, files: dict[str, str], told: tuple[float, float, float | None], tmp_path: Path, two_cpus: None
) -> None:
    proc = written(tmp_path / "proc", FAMILY | {"self/cgroup": own})
    found = busy.read(proc, written(tmp_path / "cgroup", files))
    assert (found.quota, found.throttled_s, found.stalled_s) == told
    assert found.used_s is not None


def test_here_it_is_a_share_or_unknown() -> None:
    before = busy.read()
    assert sum(k * k for k in range(200_000)) > 0
    share = busy.elsewhere(before, busy.read())
    assert share is None or 0 <= share <= 1
