"""`wrap(model)`: the model object stays itself; its calls are observed, then served by the variant that won."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, warn
from ..machine import device as devices
from ..machine.device import trace
from ..model import route
from ..tune import policy as policies
from ..tune import selfcheck
from ..tune.policy import Policy
from ..tune.supported import draft_mismatch, mismatch
from .handle import Handle
from .options import KeepOriginal, Options, When

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wrap(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft: PreTrainedModel | None = None,
    policy: str | Policy = "balanced",
    workload: Any = None,
    when: When = "background",
    observe: int = 3,
    cache: bool = True,
    keep_original: KeepOriginal = True,
    watch: float = 0.01,
    progress: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Make a live causal LM faster without making it worse. Returns the object it was given.

    With releases of torch or transformers that it was not tested with, it first finds out on a tiny model whether calls
    can be routed. Where they cannot, it warns, the model stays as it is and `status.state` is "passed through".

    Args:
        model: a Hugging Face causal LM in eval mode, with its weights loaded.
        tokenizer: needed for prompts given as strings; also provides natural text to judge quality on.
        draft: a smaller model with the same vocabulary, which may guess tokens that the model then checks; answers stay
            the model's own. It is used where a policy's `speculation` step finds that it pays.
        policy: name of a policy ("balanced", "latency", "throughput", "memory", "lossless"), a TOML file, or a Policy.
        workload: prompts to tune for (strings, token-id lists, tensors or a Workload): tuning starts at once.
            Without it the first `observe` calls of `generate` are the workload.
        when: "background" tunes in a thread between requests, "blocking" before a call returns, "manual" on `.tune()`.
        observe: calls of `generate` to observe.
        cache: read and write plans, and what the original said in exams, in the user's cache directory.
        keep_original: False frees the original's weights as soon as a plan is committed, "parked" moves them from the
            GPU to the host's memory; see `Handle.commit`.
        watch: share of the calls that a committed plan serves which the original scores again when no request is in
            flight, to notice drift; 0 turns that off. Calls' times are watched in any case.
        progress: told each step in a sentence when it begins and, where it is long, the share done while it goes on
            (`progress.Doing`, a str with `share`); default: the "autotune" logger.

    Raises:
        UnsupportedModelError: not a causal LM with loaded weights in eval mode, or a draft of another vocabulary.
        PolicyError: the policy is unknown or malformed.
        WorkloadError: the prompts cannot be used.
        StateError: it was wrapped before and its original was released.
        ValueError: another value for `when`, `observe`, `keep_original` or `watch` than those above.
    """
    if reason := mismatch(model):
        raise UnsupportedModelError(reason)
    if draft is not None and (reason := draft_mismatch(draft, model)):
        raise UnsupportedModelError(reason)
    chosen = policy if isinstance(policy, Policy) else policies.load(policy)
    options = Options(chosen, tokenizer, draft, when, observe, cache, keep_original, watch, progress)
    if keep_original == "parked" and devices.of(model).kind == "cpu":
        raise ValueError(
            "keep_original='parked' moves the original from a GPU to the host, where this model is already"
        )
    if (wrapped := model.__dict__.get(route.SLOT)) is not None:
        wrapped.unwrap()
    if when == "background":
        trace.initialise()  # the thread that tunes would be the wrong one
    handle = Handle(model, options)
    work = None if workload is None else handle.read(workload)
    if (problem := selfcheck.problem(model)) is not None:
        warn(problem)
        handle.pass_through(problem)
        return model
    route.attach(model, handle)
    if work is not None:
        try:
            handle.start(work)
        except BaseException:
            handle.unwrap()
            raise
    return model
