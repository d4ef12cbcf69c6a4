"""Speculation: guesses change how fast an answer comes, and nothing else about it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

import autotune
from autotune import profile
from autotune.errors import UnsupportedModelError, VariantError
from autotune.machine import device
from autotune.model import seam
from autotune.runtime.cache import slot_forward, slots
from autotune.runtime.dispatch import serving
from autotune.runtime.speculation.drafts import PromptLookup
from autotune.runtime.speculation.pace import LONGEST_REST, GuessBudget, evenly, expected_tokens, pays, worthwhile
from autotune.runtime.speculation.speculate import GuessCounts
from autotune.runtime.steps.compiled import CompiledStep
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.attention import Attention
from autotune.transforms.speculation import Speculation
from autotune.transforms.static_cache import StaticCache
from autotune.workload import Workload
from tests.fakes.cuda import FakeCuda
from tests.models import CONTEXT, left_padded, tiny, tiny_bert, token_prompts
from tests.runtime.test_loop import IDS, REQUESTS, ask, same
from tests.transforms.test_contract import COMPILER

REPEATING = torch.tensor([token_prompts(1)[0] * 4])  # [1, 48]
RANDOM = torch.tensor([token_prompts(1, length=48, seed=9)[0]])
DRAFTS = {"prompt": None, "right": 0, "wrong": 7}  # the seed of the model that guesses: 0 is the model's own


def guessing(arch: str = "llama", draft: str = "prompt", tokens: int = 4, **changes: Any) -> tuple[Any, Variant]:
    """A model, and a variant of it that guesses at a cost known beforehand."""
    model, seed = tiny(arch, **changes), DRAFTS[draft]
    small = None if seed is None else tiny(arch, seed=seed, **changes)
    transform = Speculation("decode", "prompt" if small is None else "model", tokens)
    variant = Variant(model, draft=small).with_transform(transform)
    assert variant.speculation is not None
    assert min(variant.speculation.costs) > 0
    variant.speculation.costs = evenly(variant.speculation.tokens, 1.1)
    return model, variant


def tally(variant: Variant) -> GuessCounts:
    assert variant.speculation is not None
    return variant.speculation.tally


class Copying(LogitsProcessor):
    """Makes the answer go round the prompt's first twelve tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        wanted = input_ids[:, [input_ids.shape[1] % 12]]
        return torch.full_like(scores, -torch.inf).scatter_(1, wanted, 0.0)  # type: ignore[return-value]


class Diary(LogitsProcessor):
    """Notes the ids it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.seen.append(input_ids[0].tolist())
        return scores


class Letters:
    """A streamer that keeps what it is given."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.given: list[list[int]] = []
        self.stop_at = stop_at
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.reshape(-1).tolist())
        if len(self.given) == self.stop_at:
            raise ConnectionError("the client went away")

    def end(self) -> None:
        self.ended = True


# Several tokens a step


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt-neox", "gemma3", "mistral-window", "mixtral"])
def test_several_steps_at_once_give_the_logits_of_one_after_the_other(arch: str, implementation: str) -> None:
    model, padded = tiny(arch), left_padded((9, 5))
    model.set_attn_implementation(implementation)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        prompt = seam.growing_cache()
        model(ids, attention_mask=mask, position_ids=positions, **seam.over(model, prompt))
        caches = [slots.SlotCache(prompt, 32) for _ in range(2)]
        for cache in caches:
            cache.fill(prompt, mask)
        tokens = torch.tensor([token_prompts(2, length=12)[i] for i in range(2)])  # [2, 12], beyond the windows
        after = positions[:, -1:] + torch.arange(1, 13)
        together = slot_forward.steps(model, tokens, after, caches[0])
        for k in range(12):
            alone = slot_forward.step(model, tokens[:, k : k + 1], after[:, k : k + 1], caches[1])
            caches[1].advance()
            torch.testing.assert_close(together[:, k], alone, atol=2e-4, rtol=1e-4)
    caches[0].advance(12)
    for one, other in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert caches[0].slot.equal(caches[1].slot)


def test_tokens_that_do_not_count_leave_no_trace() -> None:
    model = tiny("gemma3")
    with torch.no_grad():
        prompt = seam.growing_cache()
        model(IDS, **seam.over(model, prompt))
        clean, used = (slots.SlotCache(prompt, 32) for _ in range(2))
        for cache in (clean, used):
            cache.fill(prompt, None)
        token, position = IDS[:, :1], torch.tensor([[12]])
        slot_forward.steps(model, IDS[:, 3:9], position + torch.arange(6), used)
        assert torch.equal(
            slot_forward.step(model, token, position, used), slot_forward.step(model, token, position, clean)
        )


def test_several_steps_can_be_captured() -> None:
    model = tiny("gemma3")
    with torch.no_grad(), device.stand_in(FakeCuda()) as fake:
        prompt = seam.growing_cache()
        model(IDS, **seam.over(model, prompt))
        captured, eager = (slots.SlotCache(prompt, 32) for _ in range(2))
        for cache in (captured, eager):
            cache.fill(prompt, None)
        tokens, positions = IDS[:, :4].clone(), torch.arange(12, 16)[None]
        work = lambda: slot_forward.steps(model, tokens, positions, captured)  # noqa: E731

        def replayed() -> torch.Tensor:
            graph, result = fake.capture(work)
            captured.advance(2)
            tokens.copy_(IDS[:, 5:9])
            positions.add_(2)
            graph.replay()
            return result.clone()

        result = fake.owner.run(replayed)
        slot_forward.steps(model, IDS[:, :4], torch.arange(12, 16)[None], eager)
        eager.advance(2)
        torch.testing.assert_close(result, slot_forward.steps(model, IDS[:, 5:9], torch.arange(14, 18)[None], eager))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "mistral-window"])
def test_several_steps_can_be_compiled(arch: str) -> None:
    model = tiny(arch)
    with torch.no_grad():
        prompt = seam.growing_cache()
        model(IDS, **seam.over(model, prompt))
        compiled, eager = (slots.SlotCache(prompt, 32) for _ in range(2))
        for cache in (compiled, eager):
            cache.fill(prompt, None)
        steps = CompiledStep(model)
        steps.prepare(compiled, 4)
        assert steps.fitting(compiled) is None
        assert not steps.shapes, "no step of one token"
        step = steps.fitting(compiled, 4)
        assert step is not None
        for start in (12, 14):  # two of four tokens were right
            given = IDS[:, start - 12 : start - 8], torch.arange(start, start + 4)[None]
            torch.testing.assert_close(
                step(*given, compiled), slot_forward.steps(model, *given, eager), atol=1e-4, rtol=1e-4
            )
            for cache in (compiled, eager):
                cache.advance(2)


# What is guessed


@pytest.mark.parametrize(
    ("tokens", "most", "guesses"),
    [
        ([], 3, []),
        ([5], 3, []),
        ([5, 5], 3, []),  # one token alone says too little
        ([1, 2, 3, 4, 5], 3, []),
        ([1, 2, 3, 9, 1, 2], 2, [3, 9]),
        ([1, 2, 3, 9, 1, 2], 1, [3]),
        ([1, 2, 3, 9, 1, 2], 0, []),
        ([1, 2, 3, 9, 1, 2], 6, [3, 9, 1, 2, 3, 9]),  # past the end it goes on with itself
        ([7, 7, 7], 4, [7, 7, 7, 7]),
        ([1, 2, 3, 8, 1, 2, 4, 1, 2], 1, [4]),  # the latest occurrence
        ([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 1, [3]),  # unless more tokens are the same earlier
    ],
)
def test_a_lookup_guesses_what_followed_before(tokens: list[int], most: int, guesses: list[int]) -> None:
    assert PromptLookup(tokens).guess(most) == guesses
    grown = PromptLookup(tokens[:2])
    for token in tokens[2:]:
        grown.append(token)
    assert grown.guess(most) == guesses


# How far ahead


@pytest.mark.parametrize(
    ("acceptance", "guesses", "tokens"), [(0, 5, 1), (1, 5, 6), (0.5, 1, 1.5), (0.8, 4, 3.3616), (0.6, 0, 1)]
)
def test_expected_tokens(acceptance: float, guesses: int, tokens: float) -> None:
    assert expected_tokens(acceptance, guesses) == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("acceptance", "most", "cost", "guesses"),
    [
        (1.0, 4, 1.0, 4),
        (1.0, 4, 4.9, 4),
        (1.0, 4, 5.1, 0),  # five tokens in the time of more than five steps
        (0.0, 4, 1.0, 0),
        (0.5, 4, 1.1, 4),
        (0.5, 4, 2.0, 1),  # 1.5 tokens in 1.25 steps
        (0.2, 4, 2.0, 0),
    ],
)
def test_guesses_that_are_worthwhile(acceptance: float, most: int, cost: float, guesses: int) -> None:
    assert worthwhile(acceptance, evenly(most, cost)) == guesses


def spent(acceptance: list[bool], cost: float = 1.2, most: int = 4) -> tuple[int, float]:
    """Tokens, and plain steps' time, of a sequence whose guesses are right or wrong as told."""
    pace, told, time, tokens = GuessBudget(evenly(most, cost)), iter(acceptance), 0.0, 0
    while (right_next := next(told, None)) is not None:
        guesses = pace.guesses
        time += 1 + (cost - 1) * guesses / most
        right = 0
        while guesses > right and right_next:
            right += 1
            right_next = next(told, False)
        tokens += 1 + right
        pace = pace.after(guesses, right) if guesses else pace.without()
    return tokens, time


@pytest.mark.fault("A30")
def test_guesses_that_are_always_wrong_cost_next_to_nothing() -> None:
    tokens, time = spent([False] * 256)
    assert tokens == 256
    assert time < 1.02 * tokens


def test_guesses_that_are_always_right_pay_all_they_can() -> None:
    tokens, time = spent([True] * 500)
    assert tokens / time > 0.95 * 5 / 1.2


def test_guesses_are_taken_up_again_when_they_become_right() -> None:
    tokens, time = spent([False] * 200 + [True] * 500)
    assert tokens / time > 2


def test_a_step_too_slow_to_pay_is_never_taken() -> None:
    assert not pays(evenly(4, 5.5))
    assert GuessBudget(evenly(4, 5.5)).guesses == 0
    assert spent([True] * 50, cost=5.5) == (50, 50.0)


def test_rests_have_an_end() -> None:
    pace, rests = GuessBudget(evenly(4, 1.2)), []
    for _ in range(40):
        pace = pace.after(1, 0)
        rests.append(pace.rest)
        for _ in range(pace.rest):
            assert pace.guesses == 0
            pace = pace.without()
        assert pace.guesses >= 1
    assert max(rests) == LONGEST_REST


# Answers


@contextmanager
def on(where: str) -> Iterator[Any]:
    with device.stand_in(FakeCuda()) if where == "fake GPU" else nullcontext() as found:
        yield found


@pytest.mark.parametrize("where", ["CPU", "fake GPU"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_is_answered_as_by_transformers(request_: str, draft: str, where: str) -> None:
    options = REQUESTS[request_]
    with on(where):
        model, variant = guessing(draft=draft)
        served = serving(variant)
        for ids in (REPEATING, RANDOM, IDS[:, :3]):
            same(ask(served, ids, **options), ask(model, ids, **options))


@pytest.mark.parametrize("where", ["CPU", "fake GPU"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gpt-neox", "gemma3", "mistral-window", "mixtral", "phi3"])
def test_every_architecture_gives_the_same_tokens(arch: str, draft: str, where: str) -> None:
    with on(where):
        model, variant = guessing(arch, draft)
        for ids in (REPEATING, RANDOM):
            same(ask(serving(variant), ids, max_new_tokens=40), ask(model, ids, max_new_tokens=40))


@pytest.mark.parametrize("where", ["CPU", "fake GPU"])
def test_a_padded_prompt_is_answered_the_same(where: str) -> None:
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.int64), REPEATING], dim=1)
    mask = (ids != 0).long()
    for draft in DRAFTS:
        with on(where):
            model, variant = guessing("gpt2", draft)
            same(ask(serving(variant), ids, attention_mask=mask), ask(model, ids, attention_mask=mask))


def test_lookup_accepts_much_where_text_repeats_and_guesses_nothing_where_it_does_not() -> None:
    model, variant = guessing()
    copy = {"logits_processor": [Copying()], "max_new_tokens": 61}
    same(ask(serving(variant), REPEATING, **copy), ask(model, REPEATING, **copy))
    assert tally(variant).right == tally(variant).guessed == 48
    assert tally(variant).steps == 12  # four guesses and a token each: 60 steps of one token in 12
    model, variant = guessing()
    ask(serving(variant), RANDOM)
    assert tally(variant) == GuessCounts()


def test_a_perfect_draft_is_always_right_and_a_poor_one_soon_left_alone() -> None:
    _, variant = guessing(draft="right")
    ask(serving(variant), RANDOM, max_new_tokens=51)
    assert tally(variant) == GuessCounts(steps=10, guessed=40, right=40)
    _, variant = guessing(draft="wrong")
    ask(serving(variant), RANDOM, max_new_tokens=150)
    assert tally(variant).right <= 3
    assert tally(variant).steps <= 40


@pytest.mark.parametrize("where", ["CPU", "fake GPU"])
def test_modes_may_change_between_calls(where: str) -> None:
    for draft in DRAFTS:
        with on(where):
            model, variant = guessing(draft=draft)
            served, expected = serving(variant), ask(model, REPEATING)
            with torch.inference_mode():
                assert torch.equal(ask(served, REPEATING), expected)
            assert torch.equal(ask(served, REPEATING), expected)


def test_a_batch_is_decoded_token_by_token() -> None:
    model, variant = guessing()
    two = REPEATING.expand(2, -1)
    same(ask(serving(variant), two), ask(model, two))
    assert tally(variant) == GuessCounts()


@pytest.mark.parametrize("draft", DRAFTS)
def test_processors_see_what_they_would_have_seen(draft: str) -> None:
    diaries = Diary(), Diary()
    model, variant = guessing(draft=draft)
    for asked, diary in ((serving(variant), diaries[0]), (model, diaries[1])):
        ask(asked, REPEATING, max_new_tokens=30, logits_processor=[diary, Copying()])
    assert diaries[0].seen == diaries[1].seen


def test_a_processor_that_raises_leaves_the_next_answer_alone() -> None:
    class Failing(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            if input_ids.shape[1] == IDS.shape[1] + 5:
                raise ArithmeticError("not this one")
            return scores

    model, variant = guessing(draft="right")
    served = serving(variant)
    with pytest.raises(ArithmeticError):
        ask(served, logits_processor=[Failing()])
    same(ask(served), ask(model))


def test_tokens_reach_a_streamer_one_by_one() -> None:
    mine, theirs = Letters(), Letters()
    model, variant = guessing(draft="right")
    ask(serving(variant), streamer=mine)
    ask(model, streamer=theirs)
    assert mine.given == theirs.given
    assert mine.ended


def test_a_client_that_goes_away_leaves_the_next_answer_alone() -> None:
    model, variant = guessing(draft="right")
    served = serving(variant)
    with pytest.raises(ConnectionError):
        ask(served, streamer=Letters(stop_at=4))
    same(ask(served), ask(model))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_context_used_to_the_last_token(arch: str, draft: str) -> None:
    model, variant = guessing(arch, draft)
    ids = REPEATING.repeat(1, 5)[:, : CONTEXT - 20]
    same(ask(serving(variant), ids, max_new_tokens=20), ask(model, ids, max_new_tokens=20))


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_returned_cache_holds_what_counts(draft: str) -> None:
    model, variant = guessing(draft=draft)
    first = ask(serving(variant), REPEATING, return_dict_in_generate=True)
    assert seam.cache_in(first).get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat([first.sequences, IDS], dim=1)
    same(ask(model, longer, **seam.over(model, seam.cache_in(first))), ask(model, longer))


@pytest.mark.fault("A30")
def test_sampled_answers_have_the_same_distribution() -> None:
    """Chi-square over pairs of tokens, against the exact probabilities of the model itself."""
    sizes = {"vocab_size": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model, variant = guessing(draft="wrong", initializer_range=0.1, **sizes)
    model.generation_config.update(pad_token_id=None, eos_token_id=None)
    ids, draws = torch.tensor([[3, 5, 3, 5, 3]]), 800
    with torch.no_grad():
        first = model(ids).logits[0, -1].softmax(-1)  # [8]
        pairs = torch.cat([ids.expand(8, -1), torch.arange(8)[:, None]], dim=1)
        expected = (first[:, None] * model(pairs).logits[:, -1].softmax(-1)).flatten() * draws  # [64]
    served, counted = serving(variant), torch.zeros(64)
    torch.manual_seed(11)
    for _ in range(draws):
        a, b = served.generate(ids, do_sample=True, top_k=0, max_new_tokens=3)[0, 5:7].tolist()
        counted[8 * a + b] += 1
    assert tally(variant).right > 50
    assert tally(variant).guessed > tally(variant).right
    statistic = ((counted - expected) ** 2 / expected).sum().item()
    assert statistic < 103.4  # 63 degrees of freedom, p = 0.001


def test_two_threads_share_a_variant() -> None:
    model, variant = guessing(draft="right")
    served, prompts = serving(variant), [torch.tensor([p]) for p in token_prompts(4)]
    expected, answers = [ask(model, p).tolist() for p in prompts], [list[list[int]]() for _ in prompts]

    def answer(i: int) -> None:
        answers[i] = served.generate(prompts[i], max_new_tokens=12, do_sample=False).tolist()

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected
    assert tally(variant).right == tally(variant).guessed > 0


def test_the_host_waits_for_a_gpu_once_a_token() -> None:
    fake = FakeCuda()
    with device.stand_in(fake):
        _, variant = guessing("qwen3")
        served = serving(variant)
        before = fake.waits
        ask(served, REPEATING, max_new_tokens=40)
        # the prompt; the token to look up; and the same token, which has arrived by then, for the caller
        assert fake.waits - before <= 1 + 2 * 40


def test_the_host_waits_for_nothing_while_guessing_rests() -> None:
    fake = FakeCuda()
    with device.stand_in(fake):
        model, variant = guessing()
        assert variant.speculation is not None
        variant.speculation.costs = evenly(variant.speculation.tokens, 9.0)  # nothing pays, so that it always rests
        before = fake.waits
        same(ask(serving(variant), REPEATING, max_new_tokens=40), ask(model, REPEATING, max_new_tokens=40))
        assert fake.waits - before == 40  # the caller's own looks
        assert tally(variant) == GuessCounts()


def test_a_profile_counts_what_moves_for_a_token_on_average() -> None:
    _, variant = guessing(draft="right")
    work = Workload(tuple(map(tuple, token_prompts(4))), 26, (1,))
    plain = Variant(variant.original).with_transforms([StaticCache()])
    guessed, alone = (
        profile.measure(v, work, COMPILER, budget_s=0.2, scaling=False).phases["decode"] for v in (variant, plain)
    )
    assert guessed.weight_bytes < 0.5 * alone.weight_bytes
    assert guessed.flops == pytest.approx(alone.flops, rel=0.02)
    assert 0 < guessed.busy <= 1
    assert sum(row.seconds for row in guessed.operators) == pytest.approx(guessed.seconds, rel=0.2)


def test_a_draft_that_fails_is_the_variants_failure() -> None:
    _, variant = guessing(draft="right")
    assert variant.draft is not None
    variant.draft.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(VariantError, match="ZeroDivisionError"):
        ask(serving(variant))


# The draft model


@pytest.mark.fault("A30")
@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (lambda model: tiny(vocab_size=128), "a vocabulary of 128 tokens, the model one of 256"),
        (lambda model: model, "the model itself"),
        (lambda model: tiny_bert(), "cannot generate"),
        (lambda model: tiny().train(), "training mode"),
        (lambda model: tiny("mamba"), "cannot decode over slots"),
        (lambda model: torch.nn.Linear(2, 2), "not a transformers PreTrainedModel"),
    ],
)
def test_a_draft_that_cannot_guess_is_refused(draft: Any, says: str) -> None:
    model = tiny()
    with pytest.raises(UnsupportedModelError, match=says):
        autotune.wrap(model, draft=draft(model), when="manual")
    assert not hasattr(model, "autotune")


@pytest.mark.parametrize("plan", [[Attention("decode", "eager"), StaticCache()], [StaticCache()]], ids=str)
def test_slots_under_another_attention(plan: list[Transform]) -> None:
    """Eager attention adds its mask to the scores, where others take a mask of truth values."""
    model = tiny("gemma3")
    same(ask(serving(Variant(model).with_transforms(plan)), max_new_tokens=40), ask(model, max_new_tokens=40))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    period=st.lists(st.integers(3, 255), min_size=1, max_size=9),
    times=st.integers(1, 6),
    draft=st.sampled_from(sorted(DRAFTS)),
    tokens=st.integers(1, 12),
    options=st.fixed_dictionaries(
        {"max_new_tokens": st.integers(1, 24)},
        optional={
            "do_sample": st.just(True),
            "temperature": st.floats(0.2, 3.0),
            "top_k": st.integers(1, 50),
            "repetition_penalty": st.floats(0.6, 1.5),
            "no_repeat_ngram_size": st.integers(1, 3),
            "eos_token_id": st.integers(3, 255),
            "num_return_sequences": st.just(1),
        },
    ),
)
def test_whatever_is_asked_the_answer_is_the_originals(
    period: list[int], times: int, draft: str, tokens: int, options: dict[str, Any]
) -> None:
    model, variant = guessing("qwen3", draft, tokens)
    ids = torch.tensor([period * times])
    same(ask(serving(variant), ids, **options), ask(model, ids, **options))
