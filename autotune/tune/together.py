"""Tunes a model whose layers are sharded over ranks: the first rank searches, the others run what it runs.

All ranks call `tune` and end with the same plan, or with an error on every rank. No rank waits for ever: a rank that
ends closes its connections, and one that is silent for longer than a search can take is given up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import AutotuneError, in_words
from ..machine import device as devices
from ..machine import outside
from ..model import sharding
from ..report import Report
from ..runtime.ranks.follower import follow
from ..runtime.ranks.leader import Leader
from ..runtime.ranks.line import Line
from ..runtime.ranks.messages import Done
from ..runtime.variant import Variant
from . import bench, fingerprint, plan, search_lock
from .budget import longest
from .tuned import Tuned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..workload import Workload
    from .policy import Policy
SLACK_S = 600.0  # seconds of silence allowed beyond the budgets: loading kernels, measuring peaks, writing the report


def tune(model: PreTrainedModel, workload: Workload, policy: Policy, alone: Callable[[], Tuned]) -> Tuned:
    """Tune on all ranks.

    Args:
        model: this rank's part, unrouted.
        workload, policy: the same on all ranks.
        alone: tunes, as the only process of a model that is not sharded would; the first rank calls it.

    Raises:
        AutotuneError: the ranks were given different tasks, or tuning failed on the first rank.
        RuntimeError: a rank did not call this, or ended meanwhile.
    """
    members = sharding.group(model)
    assert members is not None  # noqa: S101 - the caller checked; for the type checker
    line = Line(members, (search_lock.PATIENCE + 2) * longest(policy.budget_s, model.device.type) + SLACK_S)
    try:
        tasks = line.gather((workload, policy))
        if any(task != tasks[0] for task in tasks):
            raise AutotuneError("the ranks of the model were given different workloads or policies; give all the same")
        return _led(line, alone) if line.leads else _followed(line, model, workload)
    finally:
        line.close()


def _led(line: Line, alone: Callable[[], Tuned]) -> Tuned:
    """Tune as the first rank, and tell the others what came of it."""
    leader = Leader(line)
    try:
        with leader.leading():
            tuned = alone()
        told = plan.dumps(tuned.plan), tuned.variant.transforms, tuned.report.to_dict(), tuned.verdict
    except BaseException as error:
        line.send(Done(error=in_words(error)))
        raise
    line.send(Done((*told, tuned.doubt, tuned.noisy)))
    _agree(line, None)
    return tuned


def _followed(line: Line, model: PreTrainedModel, workload: Workload) -> Tuned:
    """Do what the first rank does, and take over what it found."""
    original = Variant(model, None, workload)
    answers: dict[str, Callable[[], Any]] = {
        fingerprint.PART: partial(fingerprint.of_part, model),
        bench.FREE_BYTES: lambda: devices.of(model).memory().free,
    }
    outcome = follow(original, line, answers)
    if outcome.error is not None:
        raise AutotuneError(f"tuning failed on the first rank: {outcome.error}")
    text, transforms, record, *rest = outcome.value
    tuned, failure = None, None
    try:
        tuned = Tuned(original.with_transforms(transforms), plan.loads(text), Report(record), *rest)
    except Exception as error:
        outside.pass_on(error)
        failure = in_words(error)
    _agree(line, failure)
    assert tuned is not None  # noqa: S101 - `_agree` has raised otherwise; for the type checker
    return tuned


def _agree(line: Line, failure: str | None) -> None:
    """Raise on all ranks if the plan could not be applied on one."""
    failures = line.gather(failure)
    if (found := next((n for n, said in enumerate(failures) if said), None)) is not None:
        raise AutotuneError(f"rank {found} could not apply the plan ({failures[found]}); the original serves")
