"""A rollout in the store of experiments: `autotune experiment status rollout` and `report rollout` show it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ...compare.experiment.given import CONTROL
from ...compare.experiment.live import LiveState, LiveStatus, Standing, sentences
from ...errors import ExperimentError
from ...tune import codec
from .decision import CanaryRules, Rollout, RolloutState, findings, progress, verdict

if TYPE_CHECKING:
    from ...compare.experiment.store import Store

log = logging.getLogger("autotune.serve")

NAME, MODE, CANDIDATE = "rollout", "canary", "plan"
STATES = {
    RolloutState.CANARY: LiveState.RUNNING,
    RolloutState.PROMOTED: LiveState.FULL,
    RolloutState.ROLLED_BACK: LiveState.ROLLED_BACK,
}


def status(rollout: Rollout, rules: CanaryRules, quality: str = "") -> LiveStatus:
    """The rollout as a live experiment's status.

    Args:
        quality: what the canary's watch saw of the plan's answers, in a sentence.
    """
    standing = Standing(
        name=CANDIDATE,
        description=rollout.plan,
        verdict=verdict(rollout).value,
        reason=rollout.reason,
        requests=rollout.requests,
        share=rollout.share,
        findings=(*sentences(findings(rollout, rules)), *([f"quality: {quality}"] if quality else [])),
        bounds=rules.ramp(rollout.share).bounds(progress(rollout)) if rollout.requests else (),
    )
    counts = {"canary": rollout.requests, "other replicas": rollout.others}
    return LiveStatus(NAME, MODE, STATES[rollout.state], sum(counts.values()), counts, (standing,))


def record(store: Store, rollout: Rollout, rules: CanaryRules, quality: str = "") -> None:
    """Keep what became of a rollout. Another replica may have begun its record. A store that fails only warns."""
    found = status(rollout, rules, quality)
    arms = {CONTROL: "the plan of the other replicas", CANDIDATE: rollout.plan}
    try:
        version = store.begin(NAME, MODE, arms, {"canary": rollout.canary, "rules": codec.encode(rules)})
        store.note(version, rollout.state, rollout.reason)
        (standing,) = found.candidates
        store.conclude(version, CANDIDATE, standing.verdict, standing.reason, codec.encode(standing))
        store.conclude(version, "", standing.verdict, f"{CANDIDATE}: {standing.reason}", found.to_dict())
        if rollout.state is not RolloutState.CANARY:
            store.finish(version, "done" if rollout.state is RolloutState.PROMOTED else "rolled back")
    except ExperimentError as error:
        log.warning("the rollout is not recorded: %s", error)
