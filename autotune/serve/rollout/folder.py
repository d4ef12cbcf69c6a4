"""The directory that replicas share: the plan on offer, the rollout, everybody's figures, and a lock.

    plan.json          the plan on offer; an operator or `POST /autotune/rollout` puts it there
    rollout.json       the latest rollout; only the holder of the lock writes it
    promoted.json      the plan that was promoted last
    figures-ID.json    the answers of replica ID during the rollout
    lock               the canary holds it as long as it lives, and whoever verifies the promoted plan

Files are whole or not there, and only this user's own are read (`machine.cache_dir`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compare.experiment.guardrails import Figures
from ...compare.experiment.sequential import Moments
from ...errors import PlanError
from ...machine import cache_dir
from ...machine.locking import FileLock
from ...tune import codec, plan
from ...tune.plan import Plan
from ...tune.store import MAX_BYTES
from .decision import Rollout, RolloutState

log = logging.getLogger("autotune.serve")

OFFERED, PROMOTED, ROLLOUT, LOCK = "plan.json", "promoted.json", "rollout.json", "lock"
FIGURES = "figures-{}.json"


@dataclass(frozen=True)
class Offer:
    """A plan's text, and its hash, by which replicas name it."""

    text: bytes
    hash: str

    @classmethod
    def of(cls, text: bytes) -> Offer:
        return cls(text, hashlib.blake2b(text, digest_size=16).hexdigest())

    def plan(self) -> Plan:
        """Parse it.

        Raises:
            PlanError: it is not a plan.
        """
        return plan.loads(self.text)


class Folder:
    """The shared directory of one model's replicas.

    Args:
        path: of the directory, which exists and is this user's alone.

    Attributes:
        lock: held by a canary as long as it lives.

    Raises:
        OSError: the lock's file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path / LOCK)

    @classmethod
    def of(cls, model: str) -> Folder | None:
        """The directory for a model's name, in the cache directory; None if nothing can be kept there."""
        name = re.sub(r"[^\w.-]", "-", model).lstrip(".") or "model"
        if (all_models := cache_dir.cache("rollouts", lasting=True)) is None:
            return None
        path = all_models / name
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            cache_dir.require_private(path)
            return cls(path)
        except OSError as error:
            log.warning("no plans are rolled out: %s", error)
            return None

    @property
    def offered(self) -> Offer | None:
        """The plan on offer, or None."""
        return self._offer(OFFERED)

    @property
    def promoted(self) -> Offer | None:
        """The plan that was promoted last, or None."""
        return self._offer(PROMOTED)

    def offer(self, text: bytes) -> None:
        """Offer a plan; also one that was rolled back before.

        Raises:
            PlanError: it is not a plan.
            OSError: it cannot be written.
        """
        offer = Offer.of(text)
        offer.plan()
        last = self.rollout
        if last is not None and last.plan == offer.hash and last.state is RolloutState.ROLLED_BACK:
            (self.path / ROLLOUT).unlink(missing_ok=True)
        cache_dir.write(self.path / OFFERED, [text])

    def promote(self, offer: Offer) -> None:
        """Keep a plan as the one that all replicas serve with."""
        cache_dir.write(self.path / PROMOTED, [offer.text])

    @property
    def rollout(self) -> Rollout | None:
        """The latest rollout, or None."""
        found = self._json(self.path / ROLLOUT)
        try:
            return None if found is None else codec.decode(Rollout, found, "rollout")
        except PlanError as error:
            log.warning("%s is ignored: %s", self.path / ROLLOUT, error)
            return None

    def write(self, rollout: Rollout) -> None:
        """Keep a rollout. Call it only while holding the lock."""
        cache_dir.write(self.path / ROLLOUT, [codec.dumps(codec.encode(rollout)).encode()])

    def publish(self, replica: str, rollout: Rollout, figures: Figures) -> None:
        """Show this replica's figures to the canary."""
        body = codec.encode({"rollout": rollout.key, "figures": figures})
        cache_dir.write(self.path / FIGURES.format(replica), [codec.dumps(body).encode()])

    def control(self, rollout: Rollout) -> Figures:
        """The figures of all replicas but the canary together."""
        together: dict[str, Moments] = {}
        for path in self.path.glob(FIGURES.format("*")):
            found = self._json(path) or {}
            if found.get("rollout") != rollout.key or path.name == FIGURES.format(rollout.canary):
                continue
            try:
                figures = codec.decode(Mapping[str, Moments], found["figures"], "figures")
            except (KeyError, PlanError) as error:
                log.warning("%s is ignored: %s", path, error)
                continue
            for name, moments in figures.items():
                together[name] = together.get(name, Moments()).merged(moments)
        return together

    def forget_figures(self) -> None:
        """Remove all replicas' figures, before a rollout begins."""
        for path in self.path.glob(FIGURES.format("*")):
            path.unlink(missing_ok=True)

    def _offer(self, name: str) -> Offer | None:
        content = self._read(self.path / name)
        return None if content is None else Offer.of(content)

    def _json(self, path: Path) -> dict[str, Any] | None:
        content = self._read(path)
        try:
            found = None if content is None else codec.loads(content)
        except PlanError as error:
            log.warning("%s is ignored: %s", path, error)
            return None
        return found if isinstance(found, dict) else None

    def _read(self, path: Path) -> bytes | None:
        try:
            return cache_dir.read(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn_once(f"{path} is ignored: {error}")
            return None


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
