"""`wrap(model)`: keeps the same model object, observes its calls, then serves them with the variant that won."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, warn
from ..machine import device as devices
from ..machine import intraop
from ..machine.device import trace
from ..model import route, sharding
from ..tune import fingerprint, selfcheck
from ..tune import policy as policies
from ..tune.policy import Policy
from ..tune.supported import draft_mismatch, mismatch
from ..workload import read
from .handle import Handle
from .options import KeepOriginal, Options, When

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tune.plan import Plan


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
    plan: Plan | None = None,
) -> PreTrainedModel:
    """Make a live causal LM faster without making it worse. Returns the same object.

    For releases of torch or transformers that were not tested, it first checks on a tiny model whether calls can be
    routed. If they cannot, it warns, leaves the model as it is and sets `status.state` to "passed through".

    Args:
        model: a Hugging Face causal LM in eval mode, with its weights loaded.
        tokenizer: needed for prompts given as strings; also provides natural text to judge quality on.
        draft: a smaller model with the same vocabulary. It may guess tokens, which the model then checks, so answers
            stay the model's. It is used if the policy's `speculation` step finds that this is faster.
        policy: name of a policy ("balanced", "latency", "throughput", "memory", "lossless"), a TOML file, or a Policy.
        workload: prompts to tune for (strings, token-id lists, tensors or a Workload). With it, tuning starts now
            unless `when` is "manual". Without it, the first `observe` calls of `generate` are the workload.
        when: "background" tunes in a thread between requests, "blocking" before a call returns, "manual" on `.tune()`.
            For a model that is sharded over ranks, "background" means "manual": all ranks call `.tune()` together.
        observe: number of calls of `generate` to observe.
        cache: whether to read and write plans, and the original's exam answers, in the user's cache directory.
        keep_original: False frees the original's weights as soon as a plan is committed, "parked" moves them from the
            GPU to the host's memory; see `Handle.commit`.
        watch: share of the served calls that the original scores again while no request is in flight, to detect drift;
            0 turns scoring off. The times of calls are watched in any case.
        progress: called with a sentence when each step begins and, during a long step, with the share done
            (`progress.Doing`, a str with `share`); default: the "autotune" logger.
        plan: of an earlier run, perhaps on another machine: it is verified here before it serves, and a search follows
            only if it does not hold. `Plan.load` reads a plan.json.

    Raises:
        PlanError: `plan` was made for another model.
        UnsupportedModelError: the model is not a causal LM with loaded weights in eval mode, or the draft has another
            vocabulary.
        PolicyError: the policy is unknown or malformed.
        WorkloadError: the prompts cannot be used.
        StateError: the model was wrapped before and its original was released.
        ValueError: `when`, `observe`, `keep_original` or `watch` has a value other than those above.
    """
    if reason := mismatch(model):
        raise UnsupportedModelError(reason)
    if draft is not None and (reason := draft_mismatch(draft, model)):
        raise UnsupportedModelError(reason)
    if plan is not None:
        plan.require(fingerprint.of_model(model))
    chosen = policy if isinstance(policy, Policy) else policies.load(policy)
    options = Options(chosen, tokenizer, draft, when, observe, cache, keep_original, watch, progress, plan)
    if when == "background" and sharding.reason(model) is not None:
        options = replace(options, when="manual")  # in a thread, its collectives would come between those of requests
    if keep_original == "parked" and devices.of(model).kind == "cpu":
        raise ValueError(
            "keep_original='parked' moves the original from a GPU to the host, where this model is already"
        )
    work = None if workload is None else read(workload, tokenizer=tokenizer, model=model)
    if (wrapped := model.__dict__.get(route.SLOT)) is not None:
        wrapped.unwrap()  # once nothing that was given can be refused any more
    if options.when == "background":
        trace.initialise()  # here, because the tuning thread would be the wrong one
    handle = Handle(model, options)
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
    intraop.rest()  # a server's other threads will compute
    return model
