"""Releases that were not tested are found to work, or the model is passed through. Future ones are patched in."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation import utils as generation

import autotune
from autotune.cli import main
from autotune.errors import StateError, UnsupportedModelError
from autotune.machine import versions
from autotune.model import route, seam, shrink
from autotune.tune import selfcheck
from tests.models import ARCHITECTURES, tiny, token_prompts

FUTURE = {"torch": "2.13.0", "transformers": "5.99.0"}
IDS = torch.tensor(token_prompts(2))


@pytest.fixture
def future(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The installed transformers says that it is a release nobody has tested; nothing found before is known."""
    for module in (versions, selfcheck):
        monkeypatch.setattr(module, "library_versions", lambda: FUTURE)
    monkeypatch.setattr(selfcheck, "_found", {})
    monkeypatch.setattr(selfcheck, "MOST_S", 60.0)  # a busy machine is no other release
    monkeypatch.setattr(seam.arguments, "_CACHE_NAME", {})
    monkeypatch.setattr(route, "_ROUTED", {})
    monkeypatch.setattr(selfcheck, "_kept", lambda key, find: find())
    return monkeypatch


def answer(model: Any) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=8, do_sample=False).tolist()


def wrapped(model: Any, **options: Any) -> Any:
    return autotune.wrap(model, **({"when": "manual", "cache": False} | options))


# What a release may change


def rename_the_loop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generation.GenerationMixin, "_greedy_or_not", generation.GenerationMixin._sample, raising=False)
    patch.delattr(generation.GenerationMixin, "_sample")
    modes = {k: "_greedy_or_not" if v == "_sample" else v for k, v in generation.GENERATION_MODES_MAPPING.items()}
    patch.setattr(generation, "GENERATION_MODES_MAPPING", modes)


def rename_the_cache(patch: pytest.MonkeyPatch) -> None:
    """generate hands the loop, and the loop hands forward, a `kv_state`."""
    mixin, name = generation.GenerationMixin, seam.output_cache_name()
    prepare, sample, forward = mixin._prepare_cache_for_generation, mixin._sample, LlamaForCausalLM.forward

    def prepared(self: Any, config: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        result = prepare(self, config, kwargs, *args)
        kwargs["kv_state"] = kwargs.pop(name, None) or DynamicCache(config=self.config)
        return result

    @functools.wraps(sample)
    def sampled(self: Any, ids: Any, **kwargs: Any) -> Any:
        return sample(self, ids, **{(name if k == "kv_state" else k): v for k, v in kwargs.items()})

    def forwarded(self: Any, *args: Any, kv_state: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **({} if kv_state is None else {name: kv_state}), **kwargs)

    known = inspect.signature(forward)
    renamed = [p.replace(name="kv_state") if p.name == name else p for p in known.parameters.values()]
    forwarded.__signature__ = known.replace(parameters=renamed)  # type: ignore[attr-defined]
    patch.setattr(mixin, "_prepare_cache_for_generation", prepared)
    patch.setattr(mixin, "_sample", sampled)
    patch.setattr(LlamaForCausalLM, "forward", forwarded)


def rename_the_logits(patch: pytest.MonkeyPatch) -> None:
    """What forward returns has no `logits` for anybody but transformers' own loop."""
    mixin, inside = generation.GenerationMixin, list[bool]()
    sample, forward = mixin._sample, LlamaForCausalLM.forward

    class Output(dict):  # type: ignore[type-arg]
        def __getattr__(self, name: str) -> Any:
            if name == "logits" and not inside:
                raise AttributeError("the output has no field 'logits'; it is 'token_scores' now")
            return self.get(name)

    @functools.wraps(sample)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        try:
            return sample(self, *args, **kwargs)
        finally:
            inside.pop()

    @functools.wraps(forward)
    def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Output(forward(self, *args, **kwargs))

    patch.setattr(mixin, "_sample", sampled)
    patch.setattr(LlamaForCausalLM, "forward", forwarded)


def say_more_to_the_loop(patch: pytest.MonkeyPatch) -> None:
    """A new argument of the loop, which changes what it answers."""
    mixin = generation.GenerationMixin
    prepare = mixin._prepare_cache_for_generation

    def prepared(self: Any, config: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        kwargs["temper"] = torch.ones(1)
        return prepare(self, config, kwargs, *args)

    sample = mixin._sample

    @functools.wraps(sample)
    def sampled(self: Any, ids: Any, temper: Any = None, **kwargs: Any) -> Any:
        return sample(self, ids, **kwargs)

    patch.setattr(mixin, "_prepare_cache_for_generation", prepared)
    patch.setattr(mixin, "_sample", sampled)


CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "the loop is renamed": (rename_the_loop, "no decoding loop named '_sample'"),
    "the cache argument is renamed": (rename_the_cache, "argument kv_state"),
    "an output field is gone": (rename_the_logits, "no field 'logits'"),
    "the loop is told more": (say_more_to_the_loop, "argument temper"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_release_that_does_not_fit_is_passed_through(future: pytest.MonkeyPatch, name: str) -> None:
    change, reason = CHANGES[name]
    model = tiny("llama")
    expected = answer(model)
    change(future)
    assert answer(model) == expected  # the future works as it is
    with pytest.warns(RuntimeWarning, match="not tested with transformers 5.99.0") as caught:
        assert wrapped(model, workload=token_prompts(4), when="blocking") is model
    assert reason in str(caught[0].message)
    assert f"Known to work: transformers {versions.known('transformers')}" in str(caught[0].message)
    status = model.autotune.status
    assert status.state == "passed through"
    assert reason in status.detail
    assert not route.is_routed(model)
    assert answer(model) == expected
    with pytest.raises(StateError, match="not tested"):
        model.autotune.tune(token_prompts(4))
    copies = copy.deepcopy(model)
    assert answer(copies) == expected
    assert model.autotune.unwrap() is model
    assert not hasattr(model, "autotune")


def test_a_release_that_fits_is_routed_without_a_word(future: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    expected = answer(model)
    wrapped(model)
    assert route.is_routed(model)
    assert model.autotune.status.state == "waiting"
    assert answer(model) == expected


def test_tested_releases_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "difference", lambda _: pytest.fail("checked"))
    monkeypatch.setattr(versions, "library_versions", lambda: {"torch": "2.13.0+cpu", "transformers": "5.24.3"})
    assert selfcheck.problem(tiny("llama")) is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_judged_by_a_tiny_model_of_its_own(name: str) -> None:
    model = tiny(name, num_hidden_layers=2)
    state = torch.get_rng_state()
    small = shrink.shrunk(model)
    assert small is not None
    assert type(small) is type(model)
    assert small is not model
    assert small.num_parameters() < 300_000
    assert selfcheck.difference(model, clock=lambda: 0.0) is None
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_cannot_be_shrunk_is_judged_by_a_llama(future: pytest.MonkeyPatch) -> None:
    class Own(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            if config.hidden_size != 64 or config.vocab_size != 256:
                raise ValueError("this class comes in one size")
            super().__init__(config)

    model = tiny("llama")
    model.__class__ = Own
    assert shrink.shrunk(model) is None
    assert selfcheck.problem(model) is None
    rename_the_cache(future)
    future.setattr(selfcheck, "_found", {})
    assert "on a tiny LlamaForCausalLM, " in (selfcheck.problem(model) or "")


def test_what_was_found_is_kept_for_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    future = monkeypatch
    for module in (versions, selfcheck):
        future.setattr(module, "library_versions", lambda: FUTURE)
    future.setattr(selfcheck, "_found", {})
    future.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path))
    found = iter(["the first finding"])
    future.setattr(selfcheck, "difference", lambda _: next(found))
    model = tiny("llama")
    first = selfcheck.problem(model)
    assert "the first finding" in (first or "")
    future.setattr(selfcheck, "_found", {})  # another process
    assert selfcheck.problem(model) == first
    (file,) = (tmp_path / "checks").iterdir()
    file.write_text("{")
    future.setattr(selfcheck, "_found", {})
    future.setattr(selfcheck, "difference", lambda _: None)
    assert selfcheck.problem(model) is None


def test_the_check_ends_after_two_seconds() -> None:
    assert selfcheck.MOST_S == 2.0
    seconds = iter([0.0, 0.5, 2.5, 99.0])
    assert "did not end within 2 s" in (selfcheck.difference(tiny("llama"), clock=lambda: next(seconds)) or "")
    assert next(seconds) == 99.0  # two steps were begun, the third was not


def test_other_entrances_refuse_what_wrap_passes_through(future: pytest.MonkeyPatch) -> None:
    rename_the_cache(future)
    assert "not tested with transformers 5.99.0" in (autotune.unsupported(tiny("llama")) or "")
    with pytest.raises(UnsupportedModelError, match="argument kv_state"):
        autotune.wrap(tiny("qwen3"), draft=tiny("llama"), when="manual")


@pytest.mark.parametrize(
    ("change", "said"), [(None, "a check on a tiny model found no difference"), (rename_the_cache, "argument kv_state")]
)
def test_doctor_says_what_wrap_would(
    future: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    if change is not None:
        change(future)
    future.setenv("COLUMNS", "400")
    assert main(["doctor"]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("installed", "others"),
    [
        ({"torch": "2.13.0+cpu", "transformers": "5.24.0"}, {}),
        ({"torch": "2.13.1", "transformers": "5.24.7"}, {}),
        ({"torch": "2.99.0", "transformers": "5.24.0"}, {"torch": "2.99.0"}),
        ({"torch": "2.13.0", "transformers": "5.25.0.dev0"}, {"transformers": "5.25.0.dev0"}),
        ({"torch": "2.13.0", "transformers": "5.2.0"}, {"transformers": "5.2.0"}),
        ({"torch": "2.13.0"}, {}),
    ],
)
def test_untested_versions(installed: dict[str, str], others: dict[str, str]) -> None:
    assert versions.untested(installed) == others


def test_tested_versions_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TESTED", {"one": ("4.57", "5.0", "5.9", "5.10", "5.11"), "two": ("2.13",)})
    assert versions.known("one") == "4.57, 5.0 and 5.9 to 5.11"
    assert versions.known("two") == "2.13"
