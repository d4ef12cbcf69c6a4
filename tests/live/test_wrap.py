"""The wrapped model through its life: observed, tuned, served, rolled back, stale, unwrapped."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune.machine import ending
from autotune.model import seam
from autotune.model.route import bare, is_routed
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.static_cache import StaticCache
from autotune.tune import plan as plans
from autotune.tune import run as tuning
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.tuned import Tuned
from tests.models import left_padded, tiny, tiny_bert, tiny_t5, token_prompts
from tests.surroundings import without_threads

IDS = torch.tensor([token_prompts(1)[0]])


class Written:
    """A report that only knows its verdict."""

    def with_calls(self, served: int, bypassed: dict[str, int]) -> Written:
        return self


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tuning that always ends with the transforms in the list, and measures nothing: what is tested is the serving."""
    wanted: list[Any] = [StaticCache()]

    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms(wanted)
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), Written(), "won")

    monkeypatch.setattr(tuning, "tune", tune)
    return wanted


def greedy(model: Any, ids: torch.Tensor = IDS, tokens: int = 8, **options: Any) -> list[list[int]]:
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
    return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()


def wrapped(model: Any, **options: Any) -> Any:
    return autotune.wrap(model, **({"workload": token_prompts(4), "when": "blocking", "cache": False} | options))


@pytest.mark.parametrize("transforms", [[], [LeanLoop()], [StaticCache()]], ids=str)
def test_the_plan_serves_what_the_original_would_say(scripted: list[Transform], transforms: list[Transform]) -> None:
    scripted[:] = transforms
    model = tiny("llama")
    before, padded = greedy(model), left_padded()
    ids, mask = padded["input_ids"], padded["attention_mask"]
    batch = greedy(model, ids, attention_mask=mask)
    wrapped(model)
    assert greedy(model) == before
    assert greedy(model, ids, attention_mask=mask) == batch
    assert model.autotune.status.state == ("tuned" if transforms else "original")
    assert model.autotune.status.served == (2 if transforms else 0)


@pytest.mark.parametrize("progress", [None, list[str]().append], ids=["nobody listens", "somebody draws"])
def test_what_could_not_be_tried_is_a_warning_where_nobody_draws(
    progress: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tune(model: Any, workload: Any, policy: Any, *, traffic: Any, **_: Any) -> Tuned:
        plan = plans.Plan(Fingerprint("", "", {}, "", "", "strict"), ())
        return Tuned(Variant(model, traffic, workload), plan, Written(), "kept it, but ...", "1 of 1")

    monkeypatch.setattr(tuning, "tune", tune)
    status = wrapped(tiny("llama"), progress=progress).autotune.status
    assert (status.state, status.detail) == ("original", "kept it, but ...")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == (["kept it, but .... This is not kept as a plan: 1 of 1"] if progress is None else [])


@pytest.mark.fault("C50", "C54")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"tokens": 200}, "a context beyond the static cache's 128 tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "argument output_attentions"),
    ],
)
def test_what_a_plan_cannot_serve_goes_to_the_original_and_is_counted(
    scripted: list[Transform], options: dict[str, Any], reason: str
) -> None:
    scripted[:] = [StaticCache(slots=128)]
    model = tiny("llama")
    model.set_attn_implementation("eager")  # attentions can be asked for
    before = greedy(model, **options)
    wrapped(model)
    assert greedy(model, **options) == before
    assert model.autotune.status.bypassed == {reason: 1}
    assert model.autotune.status.served == 0


@pytest.mark.fault("C50")
def test_a_cache_of_the_callers_goes_to_the_original(scripted: list[Transform]) -> None:
    from transformers import DynamicCache

    model = wrapped(tiny("llama"))
    cache = DynamicCache(config=model.config)
    greedy(model, **seam.over(model, cache))
    assert model.autotune.status.bypassed == {"a cache of the caller's": 1}
    assert cache.get_seq_length() == IDS.shape[1] + 7


@pytest.mark.fault("C50")
def test_an_unknown_argument_raises_what_the_original_raises(scripted: list[Transform]) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="nonsense") as original:
        greedy(model, nonsense=1)
    wrapped(model)
    with pytest.raises(ValueError, match="nonsense") as routed:
        greedy(model, nonsense=1)
    assert str(routed.value) == str(original.value)


@pytest.mark.parametrize("observe", [1, 3])
def test_calls_are_observed_until_there_are_enough(scripted: list[Transform], observe: int) -> None:
    model = wrapped(tiny("llama"), workload=None, observe=observe)
    for _ in range(observe):
        assert model.autotune.status.state == "observing"
        greedy(model)
    assert model.autotune.status.state == "tuned"


@pytest.mark.parametrize("way", ["processor", "early exit", "assistant"])
def test_a_call_within_another_one_is_not_observed(scripted: list[Transform], way: str) -> None:
    """Tuning for it would wait for the outer call, in its own thread; and nobody asked for what an assistant drafts."""
    model = wrapped(tiny("llama"), workload=None, when="manual" if way == "assistant" else "blocking", observe=2)
    observer, main = model.autotune._tuning._observer, tiny("llama")

    def judge(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        greedy(model, ids, tokens=1)
        return scores

    match way:
        case "processor":
            greedy(model, logits_processor=[judge])
        case "early exit":
            greedy(model, assistant_early_exit=1)
        case "assistant":
            greedy(main, assistant_model=model)
    assert model.autotune.status.state == ("waiting" if way == "assistant" else "observing")
    assert observer.ready(1) is (way == "processor"), "the outer call alone counts; assisted decoding is no plan's"
    assert not observer.ready(2)


def test_background_tuning_ends_and_serves(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"), when="background")
    thread = model.autotune._tuning.thread
    assert thread is not None
    thread.join(60)
    assert model.autotune.status.state == "tuned"


class Paused:
    """Tuning that proves a plan, then goes on until it is let go, and ends as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meanwhile: Any = lambda model: None) -> None:
        self.proven = threading.Event()
        self.go_on = threading.Event()
        self.error = None
        self.meanwhile = meanwhile
        monkeypatch.setattr(tuning, "tune", self)

    def __call__(self, model: Any, workload: Any, policy: Any, *, traffic: Any, serve: Any, **_: Any) -> Tuned:
        variant = Variant(model, traffic, workload).with_transforms([StaticCache()])
        self.meanwhile(model)
        serve(variant)
        self.proven.set()
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error
        none = Fingerprint("", "", {}, "", "", "strict")
        return Tuned(variant, plans.Plan(none, variant.transforms), Written(), "won")

    def end(self, model: Any) -> None:
        self.go_on.set()
        model.autotune._tuning.thread.join(60)


def test_what_is_proven_serves_while_tuning_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    paused, model = Paused(monkeypatch), tiny("llama")
    expected = greedy(model)
    wrapped(model, when="background")
    assert paused.proven.wait(60)
    assert greedy(model) == expected
    status = model.autotune.status
    assert (status.state, status.served, status.transforms) == ("tuning", 1, ("static_cache(slots=0)@both",))
    paused.end(model)
    assert greedy(model) == expected
    assert (model.autotune.status.state, model.autotune.status.served) == ("tuned", 2)


@pytest.mark.parametrize("error", [autotune.errors.AutotuneError("no"), MemoryError()], ids=repr)
def test_where_tuning_fails_later_the_original_serves(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    paused, model = Paused(monkeypatch), tiny("llama")
    paused.error = error  # type: ignore[assignment]
    wrapped(model, when="background")
    assert paused.proven.wait(60)
    with pytest.warns(RuntimeWarning, match="tuning failed"):
        paused.end(model)
    greedy(model)
    assert (model.autotune.status.state, model.autotune.status.served) == ("failed", 0)


def test_what_was_proven_on_a_model_that_changed_meanwhile_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    paused, model = Paused(monkeypatch, meanwhile=train), tiny("llama")
    wrapped(model, when="background")
    assert paused.proven.wait(60)
    greedy(model)
    assert model.autotune.status.served == 0
    with pytest.warns(RuntimeWarning, match="the model changed while it was being tuned"):
        paused.end(model)


def test_tuning_that_ends_because_the_model_changed_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    Paused(monkeypatch, meanwhile=train).go_on.set()
    model = autotune.wrap(tiny("llama"), when="manual", cache=False)
    with pytest.raises(autotune.StateError, match="the model changed while it was being tuned"):
        model.autotune.tune(token_prompts(4))
    assert model.autotune.status.state == "failed"
    assert "the model changed while it was being tuned" in model.autotune.status.detail
    assert model.autotune._serving.active is None


def test_a_thread_that_cannot_be_started_leaves_tuning_to_the_next_call(
    scripted: list[Transform], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(tiny("llama"), workload=None, when="background", observe=1)
    with monkeypatch.context() as full:

        def fails(_worker: Any) -> bool:
            raise RuntimeError("can't start new thread")

        full.setattr(ending.Worker, "launch", fails)
        greedy(model)
    assert "can't start new thread" in caplog.text
    assert model.autotune.status.state == "observing"
    greedy(model)
    model.autotune._tuning.thread.join(60)
    assert model.autotune.status.state == "tuned"


def test_a_change_meanwhile_takes_it_out_and_tuning_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    paused, model = Paused(monkeypatch), tiny("llama")
    wrapped(model, when="background")
    assert paused.proven.wait(60)
    model.train()
    with pytest.warns(RuntimeWarning, match="it is in training mode"):
        greedy(model)
    assert (model.autotune.status.state, model.autotune.status.served) == ("tuning", 0)
    model.eval()
    greedy(model)
    assert (model.autotune.status.state, model.autotune.status.served) == ("tuning", 1)
    paused.end(model)
    assert model.autotune.status.state == "tuned"


def test_what_is_rolled_back_meanwhile_stays_out_until_tuning_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(tiny("llama"), when="manual", workload=None)
    handle = model.autotune
    paused = Paused(monkeypatch, meanwhile=lambda _: handle.rollback())
    greedy(model)
    tuner = threading.Thread(target=handle.tune)
    tuner.start()
    assert paused.proven.wait(60)
    assert (handle.status.state, handle.status.transforms) == ("rolled back", ())
    paused.go_on.set()
    tuner.join(60)
    assert handle.status.state == "tuned"


def test_manual_tuning_waits_to_be_asked(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"), when="manual", workload=None)
    greedy(model)
    assert model.autotune.status.state == "waiting"
    model.autotune.tune()
    assert model.autotune.status.state == "tuned"


def test_rollback_and_commit(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    before = greedy(model)
    model.autotune.rollback()
    assert greedy(model) == before
    assert model.autotune.status.state == "rolled back"
    model.autotune.commit()
    assert greedy(model) == before
    assert model.autotune.status.served == 2


def test_rolling_back_what_was_never_tuned_changes_nothing(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"), workload=None, when="blocking", observe=1)
    model.autotune.rollback()
    assert model.autotune.status.state == "observing"
    greedy(model)
    assert model.autotune.status.state == "tuned"


def test_a_call_that_ends_after_the_roll_back_says_nothing_of_what_serves(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    greedy(model)
    watch = model.autotune._serving.watch
    watch.failed("made up")
    watch.breaker = replace(watch.breaker, pause_s=0.0)  # the next call is its trial

    class RollsBack:
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 3:
                model.autotune.rollback()

        def end(self) -> None: ...

    model.generate(IDS, max_new_tokens=8, do_sample=False, streamer=RollsBack())
    assert (model.autotune.status.state, model.autotune.status.transforms) == ("rolled back", ())


def test_a_saved_model_goes_on_with_its_plan(scripted: list[Transform], tmp_path: Path) -> None:
    model = wrapped(tiny("llama"))
    tuned = greedy(model)
    model.save_pretrained(tmp_path)
    assert greedy(model) == tuned
    assert (model.autotune.status.state, model.autotune.status.served) == ("tuned", 2)


def test_tuning_that_gets_no_thread_leaves_a_model_that_serves(
    scripted: list[Transform], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        without_threads(full)
        with pytest.warns(RuntimeWarning, match="tuning could not begin: can't start new thread"):
            model = wrapped(tiny("llama"), when="background")
        greedy(model)
    model.autotune.tune()
    assert model.autotune.status.state == "tuned"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.load_state_dict(tiny("llama", seed=7).state_dict()), "was written to or converted"),
        (lambda m: m.double(), "tensor inv_freq of model.rotary_emb was replaced"),
        (lambda m: m.train(), "training mode"),
        (lambda m: m.set_submodule("model.layers.0.mlp.up_proj", torch.nn.Linear(64, 96, bias=False)), "was replaced"),
        (lambda m: m.resize_token_embeddings(260), "attribute vocab_size of the model changed"),
    ],
    ids=["load_state_dict", "double", "train", "module", "resize"],
)
def test_a_changed_model_is_served_by_the_original_again(scripted: list[Transform], change: Any, said: str) -> None:
    model = wrapped(tiny("llama"))
    change(model)
    with pytest.warns(RuntimeWarning, match=said) as warned:
        after = greedy(model)
    assert {each.filename for each in warned} == {__file__}, "not the caller's line"
    assert model.autotune.status.state == "stale"
    assert after == greedy(bare(model))
    with pytest.raises(autotune.StateError, match="stale"):
        model.autotune.commit()


@pytest.mark.parametrize("convert", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.eval()])
def test_a_conversion_that_changes_nothing_keeps_the_plan(scripted: list[Transform], convert: Any) -> None:
    model = wrapped(tiny("llama"))
    convert(model)
    greedy(model)
    assert model.autotune.status.state == "tuned"


@pytest.mark.fault("E67")
def test_a_plan_that_fails_is_dropped_and_the_original_answers(scripted: list[Transform]) -> None:
    model = tiny("llama")
    before = greedy(model)
    wrapped(model)
    (decode,) = model.autotune._serving.active.edit("decode")
    decode.forward = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError") as warned:
        assert greedy(model) == before
    assert {each.filename for each in warned} == {__file__}, "not the caller's line"
    assert model.autotune.status.state == "failed"
    assert greedy(model) == before


@pytest.mark.fault("C49", "C54")
def test_an_error_of_the_callers_own_keeps_the_plan(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        greedy(model, logits_processor=[broken])
    with pytest.raises(IndexError):
        greedy(model, ids=torch.tensor([[10_000]]))
    assert model.autotune.status.state == "tuned"


def test_unwrap_leaves_no_trace(scripted: list[Transform]) -> None:
    model = tiny("llama")
    attributes, cls, before = set(model.__dict__), type(model), greedy(model)
    wrapped(model).autotune.unwrap()
    assert (set(model.__dict__), type(model), greedy(model)) == (attributes, cls, before)


def test_a_call_that_fills_the_context_does_not_lock_tuning(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"), workload=None, observe=1)
    greedy(model, torch.full((1, 300), 7))  # of 256 positions
    assert model.autotune.status.state == "observing"
    greedy(model)
    assert model.autotune.status.state == "tuned"


def test_what_was_observed_and_cannot_be_used_does_not_lock_tuning(
    scripted: list[Transform], caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(tiny("llama"), workload=None, observe=1)
    greedy(model, torch.full((1, 8), 7), attention_mask=torch.zeros(1, 8, dtype=torch.long))
    assert "no call with a usable prompt" in caplog.text
    model.autotune.tune(token_prompts(4))
    assert model.autotune.status.state == "tuned"


@pytest.mark.parametrize("options", [{"workload": []}, {"policy": "balansed"}, {"when": "later"}], ids=str)
def test_wrapping_again_with_what_is_refused_keeps_what_serves(
    scripted: list[Transform], options: dict[str, Any]
) -> None:
    model = wrapped(tiny("llama"))
    first = model.autotune
    with pytest.raises((autotune.AutotuneError, ValueError)):
        wrapped(model, **options)
    assert model.autotune is first
    assert first.status.state == "tuned"


@pytest.mark.fault("D62")
def test_wrapping_again_starts_afresh(scripted: list[Transform]) -> None:
    model = wrapped(tiny("llama"))
    first = model.autotune
    assert wrapped(model) is model
    assert model.autotune is not first
    assert is_routed(model)


@pytest.mark.fault("D57")
def test_threads_share_a_plan(scripted: list[Transform]) -> None:
    scripted[:] = [StaticCache()]
    model = wrapped(tiny("llama"))
    prompts = [torch.tensor([p]) for p in token_prompts(6)]
    expected = [greedy(bare(model), ids) for ids in prompts]
    found: dict[int, list[list[int]]] = {}

    def ask(k: int) -> None:
        found[k] = greedy(model, prompts[k])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[k] for k in range(len(prompts))] == expected


@pytest.mark.fault("C56")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny_t5, "encoder-decoder"),
        (tiny_bert, "cannot generate"),
        (lambda: torch.nn.Linear(2, 2), "not a transformers PreTrainedModel"),
        (lambda: tiny("llama").train(), "call model.eval"),
        (lambda: tiny("llama").to("meta"), "meta device"),
    ],
    ids=["encoder-decoder", "encoder", "module", "training", "meta"],
)
def test_unsupported_models_are_refused_with_what_to_do(make: Any, said: str) -> None:
    with pytest.raises(autotune.UnsupportedModelError, match=said):
        autotune.wrap(make())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"policy": "balansed"}, autotune.PolicyError, "balanced"),
        ({"workload": []}, autotune.WorkloadError, "empty|no prompts"),
        ({"workload": ["text"]}, autotune.WorkloadError, "tokenizer"),
        ({"workload": [[1] * 300]}, autotune.WorkloadError, "256"),
        ({"when": "later"}, ValueError, "background"),
        ({"observe": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=said):
        autotune.wrap(model, **options)
    assert not is_routed(model)


def test_there_is_nothing_to_report_commit_or_tune_before_tuning() -> None:
    model = autotune.wrap(tiny("llama"), when="manual")
    with pytest.raises(autotune.StateError, match="tune"):
        model.autotune.report()
    with pytest.raises(autotune.StateError, match="tune"):
        model.autotune.commit()
    with pytest.raises(autotune.WorkloadError, match="no call was observed"):
        model.autotune.tune()
