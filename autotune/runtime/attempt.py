"""One call of generate's loop that can be answered twice: by a plan and, where that fails, by the original.

The second answer starts from a clean state: a cache of its own, the random numbers that there were, and a streamer that
has seen nothing. What the caller has seen stands, though: tokens that reached a streamer, or a processor or criterion
that may remember them, are not chosen again. The original is led through them and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..machine import outside
from ..model import seam

if TYPE_CHECKING:
    from ..machine.device import Device
    from ..model.seam import Sampling

T = TypeVar("T")


class Attempt:
    """Watches what a call's own objects (streamer, logits processors, stopping criteria) see and raise.

    Args:
        call: as it came.
        device: where it is computed.

    Attributes:
        call: the same call, to be served by what may fail.
    """

    def __init__(self, call: Sampling, device: Device) -> None:
        self._given, self._device = call, device
        self._random = device.random_state()
        self._raised: BaseException | None = None  # by the caller's own objects
        self._shown = 0  # tokens of a sequence that the streamer has seen
        self._ended = False  # and whether it was told that it has seen all
        self._chosen: torch.Tensor | None = None  # [B, P + T], with the latest token that was chosen
        self._done: list[Any] = []  # what the criteria said of each of the T tokens, [B] each
        self._scores: list[torch.Tensor] | None = [] if _returns_scores(call) else None  # [B, V] for each of them
        self._latest: torch.Tensor | None = None
        self.call = call.through(self._process, self._stop)
        if call.streamer is not None:
            self.call = self.call.with_streamer(_Streamer(self))

    def outsiders(self, error: BaseException) -> BaseException | None:
        """The exception that is the caller's own, where one is the cause of `error`: raised by what came with the call,
        or delivered from outside (a signal handler, another thread)."""
        return self._raised if self._raised is not None else outside.delivered(error, depth=2)

    def again(self, answer: Callable[[Sampling], Any]) -> Any:
        """What `answer` returns for the call when it starts from a clean state.

        Raises:
            whatever `answer` raises.
        """
        call = self._given.with_fresh_cache(self._given.model)
        self._device.set_random_state(self._random)
        if self._chosen is None or not (self._shown or seam.remembers(call)):
            return answer(call)
        told, kept = len(self._done), self._scores
        call = call.through(_Led(self._chosen[:, -told:]).scores, _Led(self._done).take)
        if call.streamer is not None:
            call = call.with_streamer(_Streamer(self, unseen=-self._shown))
        result = answer(call)
        if kept is not None:
            result.scores = (*kept[:told], *result.scores[told:])
        return result

    def _process(self, processors: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        scores = self.run(processors, *args, **kwargs)
        self._latest = scores
        return scores

    def _stop(self, criteria: Callable[..., Any], ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = self.run(criteria, ids, *args, **kwargs)
        self._done.append(done)
        self._chosen = ids
        if self._scores is not None and self._latest is not None:
            self._scores.append(self._latest)
        return done

    def run(self, theirs: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call something of the caller's, and know what it raises for the caller's own."""
        try:
            return theirs(*args, **kwargs)
        except BaseException as error:
            self._raised = error
            raise

    def show(self, value: Any) -> None:
        self.run(self._given.streamer.put, value)
        self._shown += 1

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self.run(self._given.streamer.end)


class _Streamer:
    """The caller's streamer. `unseen` is below 0 where it has seen so many tokens before."""

    def __init__(self, attempt: Attempt, unseen: int = 0) -> None:
        self._attempt, self._unseen = attempt, unseen

    def put(self, value: Any) -> None:
        self._unseen += 1
        if self._unseen > 0:
            self._attempt.show(value)

    def end(self) -> None:
        self._attempt.end()


class _Led:
    """Stands in for processors or criteria over the first tokens, whose outcome is known; then it is the caller's turn.

    Args:
        known: the tokens [B, T] that were chosen, or what was said of each of them, T of them.
    """

    def __init__(self, known: Any) -> None:
        self._known, self._at = known, 0

    def scores(self, processors: Callable[..., torch.Tensor], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that leave one choice."""
        if self._at == self._known.shape[1]:
            return processors(ids, scores)
        token = self._known[:, self._at, None]
        self._at += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def take(self, criteria: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._at == len(self._known):
            return criteria(*args, **kwargs)
        self._at += 1
        return self._known[self._at - 1]


def _returns_scores(call: Sampling) -> bool:
    return bool(call.settings.return_dict_in_generate and call.settings.output_scores)
