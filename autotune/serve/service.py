"""One wrapped model with all that its routes need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..live.status import State
from ..model import configured
from .answering import TextAnswers
from .exposition import Snapshot
from .gate import HttpLimits
from .grammar import Grammars
from .metrics import Metrics
from .prompts import Prompts
from .sampling import SamplingDefaults
from .traces import Traces
from .watching import Feed, Reading, TuningLog, figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..live.status import Status
    from .rollout.replica import Replica

UNSETTLED = (State.OBSERVING, State.WAITING, State.TUNING)  # more will be tried


@dataclass
class Service:
    """What a server serves.

    Args:
        model: wrapped by autotune.
        name: that clients name.
        aliases: further names by which clients may call it.
        given: the model as on the command line, which clients may call it by, too. It is not listed: it may be a path.
        prompts, answers, grammars, metrics: of this model.
        keys: API keys, any of which opens every route; none: no key is asked for.
        limits: of a request's size and time.
        untuned: whether it is ready without a plan.
        progress: the lines of tuning.
        rollout: its part in rollouts, if it is one of several replicas.
        failure: why the server's own first request failed.
        ending: set once no further request is taken.
    """

    model: Any
    name: str
    prompts: Prompts
    answers: TextAnswers
    grammars: Grammars
    metrics: Metrics
    aliases: Sequence[str] = ()
    given: str | None = None
    keys: Sequence[str] = ()
    limits: HttpLimits = field(default_factory=HttpLimits)
    untuned: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    progress: TuningLog = field(default_factory=TuningLog)
    rollout: Replica | None = None
    failure: str | None = None
    ending: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.feed = Feed(lambda before: figures(self.reading(), before))

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        aliases: Sequence[str] = (),
        given: str | None = None,
        keys: Sequence[str] = (),
        limits: HttpLimits | None = None,
        longest: int | None = None,
        deadline_s: float | None = None,
        most_waiting: int | None = None,
        untuned: bool = False,
        traces: Traces | None = None,
        progress: TuningLog | None = None,
    ) -> Service:
        """Serve a wrapped model.

        Args:
            longest: most tokens of a prompt; None: as many as the context holds.
            deadline_s: seconds after which an answer is given up; None: never.
            most_waiting: requests that may wait; None: as many as the model admits.
            traces: makes spans of requests and answers; None: nothing is traced.
            progress: what the model was wrapped with, if its tuning is to be shown.

        Raises:
            UnsupportedModelError: the model's configuration does not say how long its context is.
        """
        if (context := configured.context(model)) is None:
            raise UnsupportedModelError("the model's configuration does not say how many tokens its context holds")
        metrics = Metrics(name)
        known = configured.vocabulary(model)
        ends = {*configured.end_ids(model.generation_config), *configured.end_ids(tokenizer)}
        sampling = SamplingDefaults(model.generation_config, known, frozenset(ends))
        return cls(
            model=model,
            name=name,
            prompts=Prompts(tokenizer, known, context, longest),
            answers=TextAnswers(model, tokenizer, sampling, metrics, deadline_s, most_waiting, traces or Traces()),
            grammars=Grammars(tokenizer, known, ends),
            metrics=metrics,
            aliases=tuple(aliases),
            given=given,
            keys=tuple(keys),
            limits=limits or HttpLimits(),
            untuned=untuned,
            progress=progress or TuningLog(),
        )

    @property
    def has_answered(self) -> bool:
        """Whether an answer was finished, the server's own or a client's."""
        return self.answers.finished > 0

    def knows(self, name: str | None) -> bool:
        """Whether a request that names this model, or none, is meant for this server."""
        return not name or name in (self.name, *self.aliases, self.given)

    def unready(self) -> str | None:
        """Why requests should not be sent here yet, or any longer; or None."""
        if self.ending.is_set():
            return "draining: answers under way end, and no further request is taken"
        if not self.has_answered:
            failure = f"; the server's own failed: {self.failure}" if self.failure else ""
            return f"no request was answered yet{failure}"
        handle = self.model.autotune
        status = handle.status
        if self.untuned or status.state not in UNSETTLED or handle.plan is not None:
            return None  # a search ended before: while one is repeated, its outcome serves as well as it did
        return f"the model is {status.state}: {status.detail}".rstrip(": ")

    def state(self) -> dict[str, Any]:
        """What serves, for people and metrics."""
        status = self.model.autotune.status
        return {
            "model": self.name,
            "state": str(status.state),
            "transforms": list(status.transforms),
            "batching": status.batching,
            "running": self._running(status),
            "waiting": status.waiting,
            "reused": status.load.reused,
            "served": status.served,
            "bypassed": dict(status.bypassed),
        }

    def snapshot(self) -> Snapshot:
        """What Prometheus reads of this moment."""
        status = self.model.autotune.status
        return Snapshot(
            running=self._running(status),
            waiting=status.waiting,
            ready=self.unready() is None,
            state=str(status.state),
            transforms=", ".join(status.transforms),
            resting=status.resting,
            bypassed=status.bypassed,
            load=status.load,
        )

    def reading(self) -> Reading:
        """What a page shows of this moment."""
        status, metrics = self.model.autotune.status, self.metrics
        lines = self.progress.lines()
        return Reading(
            at_s=time.monotonic(),
            status=status,
            plan=self.model.autotune.plan,
            lines=self.progress.count,
            latest=lines[-1] if lines else None,
            running=self._running(status),
            waiting=status.waiting,
            counts=metrics.counts(),
            first=metrics.first.percentiles(),
            following=metrics.next.percentiles(),
        )

    def _running(self, status: Status) -> int:
        """How many answers are under way and do not wait."""
        return max(self.answers.running - status.waiting, 0)
