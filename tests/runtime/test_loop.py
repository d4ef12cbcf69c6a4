"""The lean loop, the static cache and the compiled step against transformers' own loop, token for token."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria

from autotune.errors import TransformError
from autotune.machine import cache_dir, device
from autotune.model import seam
from autotune.runtime import kernels, loop
from autotune.runtime.dispatch import serving, unsupported
from autotune.runtime.loop_state import drawn_by_one_number, drawn_unwaiting, largest
from autotune.runtime.steps.compiled import artifact
from autotune.runtime.steps.waiting import WAITS
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.compile_step import CompileStep
from autotune.transforms.cuda_graph import CudaGraph
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.one_query_attention import OneQueryAttention
from autotune.transforms.static_cache import StaticCache, no_slots
from autotune.transforms.step_program import StepProgram
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import left_padded, tiny, token_prompts

PLANS: dict[str, list[Transform]] = {
    "lean": [LeanLoop()],
    "slots": [StaticCache()],
    "one query": [OneQueryAttention(phase="decode"), StaticCache()],
}
DECODERS = ["llama", "qwen3", "gpt2", "gpt-neox", "opt", "gemma3", "mistral-window", "mixtral", "phi3"]
IDS = torch.tensor([token_prompts(1)[0]])


class Banned(LogitsProcessor):
    """Forbids the token that was chosen last."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)  # type: ignore[return-value]


class Flat(LogitsProcessor):
    """Takes a view for which the tokens must lie without gaps, as transformers' do."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = input_ids.view(-1).bincount(minlength=scores.shape[-1])
        return scores - seen.clamp(max=1)


class Long(StoppingCriteria):
    """Stops a sequence whose tokens add up to much."""

    def __repr__(self) -> str:  # the same in every process that shares the tests out
        return "Long()"

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.sum(-1) > 2500


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "processor": {"logits_processor": [Banned()]},
    "processor of a view": {"logits_processor": [Flat()], "do_sample": True, "num_return_sequences": 2},
    "criteria": {"stopping_criteria": [Long()]},
    "end of sequence": {"eos_token_id": list(range(40))},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


def ask(model: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **({"max_new_tokens": 12, "do_sample": False} | options))


def same(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(mine, theirs)
        return
    assert torch.equal(mine.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    assert type(seam.cache_in(mine)) is type(seam.cache_in(theirs))
    assert seam.cache_in(mine).get_seq_length() == seam.cache_in(theirs).get_seq_length()


@pytest.fixture(autouse=True)
def built() -> None:
    if reason := kernels.available():
        pytest.skip(reason)


@pytest.mark.fault("C54")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_is_answered_as_by_transformers(plan: str, request_: str) -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(PLANS[plan]))
    options = REQUESTS[request_]
    same(ask(served, **options), ask(model, **options))
    same(ask(served, IDS[:, :3], **options), ask(model, IDS[:, :3], **options))  # a second, shorter prompt


def test_code_of_a_model_without_source_is_not_kept() -> None:
    """As where its class was made in a notebook."""
    model = tiny("llama")
    model.__class__ = type("Mine", (type(model),), {})
    assert artifact(model, (1, 128), True) is None


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("arch", DECODERS)
def test_every_architecture_decodes_the_same_tokens(arch: str, plan: str) -> None:
    model, padded = tiny(arch), left_padded()
    served = serving(Variant(model).with_transforms(PLANS[plan]))
    same(ask(served, max_new_tokens=40), ask(model, max_new_tokens=40))  # beyond the sliding windows
    ids, mask = padded["input_ids"], padded["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))


def test_a_model_without_slots_says_why() -> None:
    assert "position_ids" in (no_slots(tiny("mamba")) or "")
    assert no_slots(tiny("llama")) is None


class Ends(LlamaForCausalLM):
    """A model whose loop is its own."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._sample(*args, **kwargs)
        found[:, -1] = 7
        return found


def test_a_loop_of_the_models_own_is_not_replaced() -> None:
    model: Any = tiny("llama")
    assert seam.cannot_step(model) is None
    model.__class__ = Ends
    assert seam.cannot_step(model) == "the model has a _sample of its own, which the loop would not call"
    other: Any = tiny("llama")
    other.prepare_inputs_for_generation = other.prepare_inputs_for_generation
    assert "prepare_inputs_for_generation of its own" in (seam.cannot_step(other) or "")


def test_inputs_on_another_device_are_the_originals_to_move() -> None:
    variant = Variant(tiny("llama")).with_transform(LeanLoop())
    call = seam.Sampling.of(variant.original, IDS.to("meta"), {"generation_config": GenerationConfig(max_length=20)})
    assert unsupported(variant, call) == "inputs on another device than the model's"


@pytest.mark.parametrize("dims", [2, 3])
def test_positions_of_several_dimensions_are_declined(dims: int) -> None:
    """Of time, height and width, as models of text and images have them."""
    model = tiny("llama")
    places = torch.arange(IDS.shape[1])[None] if dims == 2 else torch.arange(IDS.shape[1]).expand(3, 1, -1)
    call = seam.Sampling(model, IDS, {}, {"position_ids": places})
    assert call.unusual_argument() in (
        (None, "argument position_ids") if dims == 2 else ("positions of several dimensions", "argument position_ids")
    )
    if hasattr(model, "_prepare_position_ids_for_generation"):
        assert (call.unusual_argument() is None) == (dims == 2)


def test_a_returned_cache_is_the_callers_own() -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms([StaticCache()]))
    first = ask(served, return_dict_in_generate=True)
    keys = seam.keys_and_values(seam.cache_in(first))[0][0].clone()
    ask(served, IDS.flip(1))
    assert torch.equal(seam.keys_and_values(seam.cache_in(first))[0][0], keys)
    longer = torch.cat([first.sequences, IDS], dim=1)
    same(ask(model, longer, **seam.over(model, seam.cache_in(first))), ask(model, longer))


def test_a_nan_left_by_one_sequence_does_not_reach_the_next() -> None:
    variant = Variant(tiny("llama")).with_transforms([StaticCache()])
    served = serving(variant)
    before = ask(served, IDS[:, :4])
    assert variant.caches is not None
    ask(served)
    (idle,) = variant.caches._idle[1]
    for tensor in (*idle.keys, *idle.values):
        tensor[:, :, : idle.length] = torch.nan
    assert torch.equal(ask(served, IDS[:, :4]), before)


@pytest.mark.parametrize(
    "arch", ["llama", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("gpt2", "gemma3", "mixtral"))]
)
def test_a_compiled_step_decodes_the_same_tokens(arch: str) -> None:
    model = tiny(arch)
    work = Workload(tuple(map(tuple, token_prompts(4))), 12, (1, 2))
    try:
        variant = Variant(model, workload=work).with_transform(CompileStep(phase="decode"))
    except TransformError as refusal:
        if arch == "mixtral" and seam.PLACES in seam.parameters(model):
            pytest.skip(f"to transformers 5.3 its experts are not traced: {refusal}")
        raise
    assert variant.step is not None
    assert {batch for batch, _ in variant.step.shapes} == {1, 2}
    served, padded = serving(variant), left_padded((9, 5))
    for prompt in (IDS, IDS[:, :3]):
        same(ask(served, prompt), ask(model, prompt))
    ids, mask = padded["input_ids"], padded["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))
    for positions in (torch.arange(9)[None], torch.arange(9, dtype=torch.int32)[None]):  # for both sequences
        same(ask(served, ids, position_ids=positions), ask(model, ids, position_ids=positions))
    three = left_padded()  # a batch nobody compiled for runs the same module uncompiled
    ids, mask = three["input_ids"], three["attention_mask"]
    same(ask(served, ids, attention_mask=mask), ask(model, ids, attention_mask=mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_attn_implementation("eager"),
        lambda m: setattr(m.config, "rms_norm_eps", 0.1),
        lambda m: m.double(),
        lambda m: setattr(m.model.layers[0].mlp, "up_proj", torch.nn.Linear(64, 96)),
    ],
    ids=["attention", "config", "dtype", "module"],
)
def test_compiled_code_is_kept_apart_by_all_that_shapes_it(change: Any) -> None:
    model = tiny("llama")
    before = artifact(model, (1, 128), True)
    assert before is not None
    assert before == artifact(tiny("llama", seed=5), (1, 128), True)  # weights are passed, not compiled in
    assert before != artifact(model, (1, 256), True)
    assert before != artifact(model, (1, 128), True, "max-autotune")
    with device.stand_in(FakeCuda()):
        assert before != artifact(model, (1, 128), True)
    change(model)
    assert artifact(model, (1, 128), True) != before


def test_a_damaged_artifact_costs_a_compilation_and_nothing_else() -> None:
    model = tiny("llama")
    first = Variant(model).with_transforms([CompileStep(phase="decode")])
    assert first.step is not None
    folder = cache_dir.cache("steps")
    assert folder is not None
    kept = max(folder.glob("*.step"), key=lambda file: file.stat().st_mtime_ns)
    kept.write_bytes(b"not code")
    again = Variant(model).with_transforms([CompileStep(phase="decode")])
    assert kept.read_bytes() != b"not code"  # it was found, and made anew
    same(ask(serving(again)), ask(model))


def test_a_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms([StaticCache()]))
    with torch.inference_mode():
        first = ask(served)
    same(ask(served), first)
    same(first, ask(model))


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": list(range(40))}], ids=["length", "end of sequence"])
def test_on_a_cpu_no_step_is_made_in_vain(ends: dict[str, Any]) -> None:
    served, counted = serving(Variant(tiny("llama")).with_transforms([StaticCache()])), Order()
    options = {"max_new_tokens": 30, "attention_mask": torch.ones_like(IDS), **ends}
    tokens = ask(served, **options).shape[1] - IDS.shape[1]
    assert tokens < 30 or not ends
    with counted:
        ask(served, **options)
    assert counted.done.count("step") == tokens  # the prompt's, and one after every token but the last
    assert "look" not in counted.done


class Shown:
    """A streamer that notes what it is given, and may fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.given: list[list[int]] = []
        self.ended = False
        self.fail_at = fail_at

    def put(self, value: torch.Tensor) -> None:
        if len(self.given) == self.fail_at:
            raise ConnectionError("the listener is gone")
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class Impatient(StoppingCriteria):
    """Fails at a length."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] > 16:
            raise TimeoutError("took too long")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


AHEAD_PLANS: dict[str, list[Transform]] = {
    "growing cache": [LeanLoop()],
    "slots": [StaticCache()],
    "graphs": [CudaGraph(phase="decode", shortest=16)],
}


@pytest.mark.parametrize("plan", AHEAD_PLANS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_one_step_ahead_every_request_is_answered_as_by_transformers(plan: str, request_: str, fake: FakeCuda) -> None:
    model = tiny("llama")
    served, options = serving(Variant(model).with_transforms(AHEAD_PLANS[plan])), REQUESTS[request_]
    padded = left_padded()
    for ids, more in ((IDS, {}), (padded["input_ids"], {"attention_mask": padded["attention_mask"]}), (IDS[:, :3], {})):
        same(ask(served, ids, **options, **more), ask(model, ids, **options, **more))
        state = torch.get_rng_state()
        ask(model, ids, **options, **more)
        assert torch.equal(torch.get_rng_state(), state), "it drew another number of random numbers"


@pytest.mark.parametrize("plan", AHEAD_PLANS)
@pytest.mark.parametrize("ends", [{}, {"eos_token_id": list(range(40))}, {"stopping_criteria": [Long()]}], ids=str)
def test_one_step_ahead_the_cache_holds_what_transformers_would_return(
    plan: str, ends: dict[str, Any], fake: FakeCuda
) -> None:
    """A step that was launched and not kept is not in it, and the next answer goes on from there as it should."""
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(AHEAD_PLANS[plan]))
    mine, theirs = (ask(m, max_new_tokens=30, return_dict_in_generate=True, **ends) for m in (served, model))
    assert torch.equal(mine.sequences, theirs.sequences)
    for given, expected in zip(
        seam.keys_and_values(seam.cache_in(mine)), seam.keys_and_values(seam.cache_in(theirs)), strict=True
    ):
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", AHEAD_PLANS)
def test_one_step_ahead_a_streamer_is_given_the_same(plan: str, fake: FakeCuda) -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(AHEAD_PLANS[plan]))
    mine, theirs = Shown(), Shown()
    for streamer, asked in ((mine, served), (theirs, model)):
        ask(asked, streamer=streamer, eos_token_id=list(range(40)), max_new_tokens=30)
    assert mine.given == theirs.given
    assert mine.ended


@pytest.mark.fault("C54")
@pytest.mark.parametrize("plan", AHEAD_PLANS)
@pytest.mark.parametrize(
    ("options", "error"),
    [({"streamer": Shown(fail_at=3)}, ConnectionError), ({"stopping_criteria": [Impatient()]}, TimeoutError)],
    ids=["streamer", "criteria"],
)
def test_one_step_ahead_a_callback_that_fails_poisons_nothing(
    plan: str, options: dict[str, Any], error: type[Exception], fake: FakeCuda
) -> None:
    model = tiny("llama")
    served = serving(Variant(model).with_transforms(AHEAD_PLANS[plan]))
    expected = ask(model)
    same(ask(served), expected)
    with pytest.raises(error):
        ask(served, **options)
    same(ask(served), expected)


class Order(TorchDispatchMode):
    """Notes what is done in which order: steps of the model, and looks of the host."""

    def __init__(self, fake: FakeCuda | None = None) -> None:
        super().__init__()
        self.done: list[str] = []
        if fake is not None:
            self.watch(fake)

    def watch(self, fake: FakeCuda) -> None:
        fetch = fake.fetch

        def noted(tensor: torch.Tensor) -> Any:
            arrived = fetch(tensor)
            return lambda: (self.done.append("look"), arrived())[1]

        fake.fetch = noted  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::embedding":
            self.done.append("step")
        if func._schema.name in WAITS:
            self.done.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampling"])
def test_the_next_step_is_launched_before_the_host_looks(sampling: bool, fake: FakeCuda) -> None:
    """And nothing else makes the host wait; no step is launched in vain where the length tells the end."""
    served = serving(Variant(tiny("llama")).with_transforms([StaticCache()]))
    options = {"max_new_tokens": 5, "do_sample": sampling, "attention_mask": torch.ones_like(IDS)}
    ask(served, **options)
    order = Order(fake)
    with order:
        ask(served, **options)
    loop = order.done[order.done.index("look") :]  # to 5.17 the prompt's own forward waits by itself
    assert loop == ["look", "step", *["step", "look"] * 3, "look"]  # the first token does not wait for a launch


def test_scores_that_are_no_probabilities_are_refused_as_by_transformers(fake: FakeCuda) -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return scores if input_ids.shape[1] < 15 else scores * torch.nan  # type: ignore[return-value]

    model = tiny("llama")
    for asked in (model, serving(Variant(model).with_transforms([StaticCache()]))):
        with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan` or element < 0"):
            ask(asked, do_sample=True, logits_processor=[Broken()])


class Remembering(LogitsProcessor):
    """Keeps all scores that it sees, and a copy of each."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.seen.append((scores, scores.clone()))
        return scores


@pytest.mark.skipif(bool(kernels.available()), reason=str(kernels.available()))
def test_scores_that_a_processor_keeps_are_not_those_of_a_later_step() -> None:
    served, remembering = serving(Variant(tiny("llama")).with_transforms([StepProgram("decode")])), Remembering()
    ask(served, logits_processor=[remembering])
    assert len(remembering.seen) == 12
    assert all(torch.equal(kept, copy) for kept, copy in remembering.seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_largest_score_is_that_of_argmax(dtype: torch.dtype) -> None:
    scores = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).mul(3).round().to(dtype)  # ties
    scores[3, 20] = scores[3, 40] = scores[4, 0] = torch.nan
    scores[5] = -torch.inf
    chosen = torch.from_numpy(largest(scores))
    assert torch.equal(chosen, scores.argmax(-1))
    assert chosen[3] == 20


def test_tokens_are_drawn_as_by_multinomial() -> None:
    for seed in range(100):
        odds = torch.randn(3, 257, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected, state = torch.multinomial(odds.softmax(-1), 1).squeeze(1), torch.get_rng_state()
        torch.manual_seed(seed)
        token, sound = drawn_unwaiting(odds)
        assert torch.equal(token, expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert sound.all()


def test_one_number_draws_from_the_distribution() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[0.5, -torch.inf, 0.2, 0.25, 1e-3, 0.049, -torch.inf]]).log().nan_to_num(nan=-torch.inf)
    draws = 20_000
    counts = torch.tensor([drawn_by_one_number(scores) for _ in range(draws)]).bincount(minlength=7)
    odds = scores.softmax(-1)[0]
    assert counts[odds == 0].sum() == 0
    possible = odds > 0
    expected = draws * odds[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 18.5  # chi-square of 4 degrees of freedom, 0.1 %


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_a_token_that_is_not_possible_is_not_drawn_at_the_edges_either(number: float) -> None:
    scores = torch.full((1, 300), -torch.inf)
    scores[0, 7:9] = 3.0
    with mock.patch.object(torch, "rand", return_value=torch.tensor(number, dtype=torch.float64)):
        assert drawn_by_one_number(scores) == (7 if number == 0 else 8)


@pytest.mark.parametrize("score", [torch.nan, torch.inf])
def test_scores_without_probabilities_are_an_error(score: float) -> None:
    with pytest.raises(RuntimeError, match="probability tensor"):
        drawn_by_one_number(torch.tensor([[0.0, score]]))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", AHEAD_PLANS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_on_a_gpu_every_request_is_answered_as_by_transformers(plan: str, request_: str) -> None:
    model, options = tiny("llama").to("cuda"), REQUESTS[request_]
    served = serving(Variant(model).with_transforms(AHEAD_PLANS[plan]))
    for ids in (IDS.to("cuda"), IDS[:, :3].to("cuda")):
        same(ask(served, ids, **options), ask(model, ids, **options))


@pytest.mark.gpu
def test_on_a_gpu_the_loop_never_makes_the_host_wait() -> None:
    """But for the copies it asked for: torch tells of every other wait."""
    ids = IDS.to("cuda")
    served = serving(Variant(tiny("llama").to("cuda")).with_transforms([CudaGraph(phase="decode", shortest=16)]))
    options = {"do_sample": True, "attention_mask": torch.ones_like(ids)}
    ask(served, ids, **options)
    sample = loop.sample

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return sample(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "sample", watched)
        ask(served, ids, **options)
