"""The quality gate on a tiny random model: nothing broken passes, nothing whole fails."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autotune.model import shrink, stateful
from autotune.runtime import dispatch
from autotune.runtime.variant import Variant
from autotune.transforms.lean_loop import LeanLoop
from autotune.validate import Quality, Verdict, texts
from autotune.validate.divergence import Divergence, compare_logits, find_defect
from autotune.validate.quality import Exam, beyond, decide, judge, repetition
from autotune.validate.tally import Tally
from autotune.validate.texts import Text
from autotune.validate.tiers import SIZES, TIERS
from benchmarks.prove.corruptions import (
    CORRUPTIONS,
    edited,
    replace_weight,
    rewrap,
    scaled,
    with_logits,
    zeroed_head,
)
from tests import architectures
from tests.validate.loops import looping

VOCABULARY = 200


def built(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.15,  # wide enough that the distribution is not flat, so that damage shows
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return built(layers=2)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(40, 90, (20,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def exam(model, prompts):
    return Exam.prepare(model, prompts, pad_token_id=0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tier", TIERS)
def test_an_identical_variant_passes(model, exam, tier):
    found = judge(exam, edited(model, lambda module: None, "both"), tier)
    assert found.verdict is Verdict.PASS, found.reason
    assert found.mean_kld < 1e-6
    assert found.same_top == 1.0
    assert found.ppl_ratio == pytest.approx(1, abs=1e-4)
    assert found.prompts >= 16
    assert {"natural", "own", "second-prompt", "padded-batch", "long", "prefill"} <= set(found.strata)


@pytest.mark.parametrize(
    "corruption", [pytest.param(c, id=c.name, marks=pytest.mark.fault(c.fault)) for c in CORRUPTIONS]
)
def test_a_corrupt_variant_fails(model, exam, corruption):
    found = judge(exam, edited(model, corruption.how), "lossless")
    assert found.verdict in (Verdict.FAIL, Verdict.ERROR), found.reason
    assert corruption.says in found.reason


def test_the_gate_leaves_the_original_alone(model, exam):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = model.generation_config.to_dict()
    judge(exam, edited(model, scaled(1.02)), "strict")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.generation_config.to_dict() == config
    assert "autotune" not in model.__dict__


def test_bad_prefill_is_found_although_decode_is_whole(model, exam):
    found = judge(exam, edited(model, zeroed_head, "prefill"), "aggressive")
    assert found.verdict is Verdict.FAIL
    assert found.strata["prefill"] > 0.15


@pytest.mark.fault("A3")
def test_wrong_type_of_logits_fails(model, exam):
    found = judge(exam, edited(model, with_logits(lambda logits, call, kwargs: logits.half()), "prefill"), "strict")
    assert found.verdict is Verdict.FAIL
    assert "torch.float16" in found.reason


def test_an_early_failure_tells_its_figures(model, exam):
    found = judge(exam, edited(model, zeroed_head), "strict")
    assert found.tokens < 200
    assert all(word in found.reason for word in ("mean KLD", "same top token", "perplexity x"))


@pytest.mark.fault("A1")
@pytest.mark.parametrize("error", [RuntimeError("no kernel"), MemoryError(), ValueError("odd shape")])
def test_a_variant_that_raises_is_an_error(model, exam, error):
    def do(module):
        def forward(inner, kwargs):
            raise error

        rewrap(module, forward)

    found = judge(exam, edited(model, do), "strict")
    assert found.verdict is Verdict.ERROR
    assert type(error).__name__ in found.reason
    assert math.isnan(found.mean_kld)


@pytest.mark.fault("A25")
def test_an_interrupt_is_not_swallowed(model, exam):
    def do(module):
        def forward(inner, kwargs):
            raise KeyboardInterrupt

        rewrap(module, forward)

    with pytest.raises(KeyboardInterrupt):
        judge(exam, edited(model, do), "strict")


@pytest.mark.fault("A6", "A7")
@pytest.mark.parametrize(
    ("shortcut", "tier", "words"),
    [
        ([2], "strict", "times as long"),
        ([9] * 16, "strict", "repeats itself"),
        ([*range(10, 26)], "lossless", "differs"),
    ],
)
def test_what_is_served_without_processors_is_judged_too(model, exam, shortcut, tier, words):
    def without_processors(variant, call):
        if call.options["logits_processor"]:
            return call.original()
        return torch.cat([call.input_ids, torch.tensor([shortcut])], dim=1)

    found = judge(exam, looping(model, without_processors), tier)
    assert found.verdict is Verdict.FAIL
    assert words in found.reason


def test_ignoring_logits_processors_fails(model, exam):
    def deaf(variant, call):
        return torch.cat([call.input_ids, torch.full((call.input_ids.shape[0], 32), 5)], dim=1)

    found = judge(exam, looping(model, deaf), "strict")
    assert found.verdict is Verdict.FAIL
    assert "0 of 32 tokens" in found.reason


@pytest.fixture
def reluctant(model, monkeypatch):
    """Makes variants that leave some calls to the original."""

    def refusing(refuses):
        def unsupported(variant, call):
            return "not this" if variant.transforms and refuses(call) else None

        monkeypatch.setattr(dispatch, "unsupported", unsupported)
        return edited(model, lambda module: None)

    return refusing


def test_what_the_original_serves_proves_nothing(exam, reluctant):
    found = judge(exam, reluctant(lambda call: True), "strict")
    assert (found.verdict, found.examined) == (Verdict.INCONCLUSIVE, False)
    assert found.reason == "it leaves 16 of 16 prompts to the original: not this"


def test_a_few_prompts_that_are_served_do_not_stand_for_the_others(exam, reluctant):
    longest = max(len(text.context) for text in exam.texts[1:])
    found = judge(exam, reluctant(lambda call: call.input_ids.shape == (1, longest)), "strict")
    assert (found.verdict, found.examined) == (Verdict.INCONCLUSIVE, False)
    assert re.fullmatch(r"it leaves \d{1,2} of 16 prompts to the original: not this", found.reason)
    assert found.tokens > 0


def test_a_variant_for_single_requests_is_judged_on_those(exam, reluctant):
    found = judge(exam, reluctant(lambda call: call.input_ids.shape[0] > 1), "lossless")
    assert (found.verdict, found.examined) == (Verdict.PASS, True)
    assert "padded-batch" not in found.strata


@pytest.mark.fault("B44")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda prompts: prompts[:10], "need 6 more prompts"),
        (lambda prompts: prompts[:1] * 40, "need 15 more prompts"),  # duplicates count once
        (lambda prompts: [p[:1] for p in prompts], "need 16 more prompts"),
        (lambda prompts: [], "need 16 more prompts"),
    ],
)
def test_too_little_text_is_inconclusive(model, prompts, change, words):
    exam = Exam.prepare(model, change(prompts), pad_token_id=0)
    found = judge(exam, Variant(model), "strict")
    assert (found.verdict, found.examined) == (Verdict.INCONCLUSIVE, False)
    assert words in found.reason


def test_short_prompts_are_enough_when_their_continuations_count(model, prompts):
    exam = Exam.prepare(model, [p[:3] for p in prompts], pad_token_id=0)
    assert judge(exam, edited(model, lambda module: None), "strict").verdict is Verdict.PASS
    assert judge(exam, edited(model, zeroed_head), "strict").verdict is Verdict.FAIL


@pytest.mark.fault("B43")
def test_an_original_in_training_mode_cannot_be_a_reference(model, prompts):
    model.train()
    try:
        exam = Exam.prepare(model, prompts, pad_token_id=0)
    finally:
        model.eval()
    assert "training mode" in judge(exam, Variant(model), "strict").reason


@pytest.mark.fault("B43")
def test_an_original_with_nan_cannot_be_a_reference(model, prompts):
    broken = edited(model, lambda module: replace_weight(module.lm_head, module.lm_head.weight * math.nan)).modules
    exam = Exam.prepare(broken["decode"], prompts, pad_token_id=0)
    assert "NaN" in judge(exam, Variant(broken["decode"]), "strict").reason


def test_reference_logits_that_there_is_no_room_for_are_computed_again(model, prompts, monkeypatch):
    monkeypatch.setattr("autotune.validate.shelf.Shelf.put", lambda *_: False)
    exam = Exam.prepare(model, prompts, pad_token_id=0)
    assert judge(exam, edited(model, lambda module: None), "lossless").verdict is Verdict.PASS


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "bloom", "mamba2", "gemma3_text"])
def test_a_padded_batch_is_read_at_once_as_it_would_be_stepped(name, prompts):
    original = architectures.built(name)
    exam = Exam(original, SIZES["quick"], 0, (2,))
    own = [[token % shrink.VOCABULARY for token in prompt[:40]] for prompt in prompts]
    (group, *_) = texts.padded([tuple(max(3, token) for token in prompt) for prompt in own], SIZES["quick"])
    stateful.of(original)  # which runs it
    calls = []
    original.register_forward_pre_hook(lambda *given: calls.append(given))
    read = exam.reference(group)
    assert len(calls) == 1
    stepped = exam.reference(group, stepped=True)
    assert len(calls) == 1 + len(group[0].scored)
    assert read.shape == stepped.shape == (len(group), len(group[0].scored), shrink.VOCABULARY)
    targets = torch.tensor([text.scored for text in group])
    assert compare_logits(read.flatten(0, 1), stepped.flatten(0, 1), targets.flatten()).kld.max() < 1e-4


def test_in_16_bits_a_lossless_candidate_is_compared_with_steps(model, prompts):
    original = copy.deepcopy(model).bfloat16()
    exam = Exam.prepare(original, prompts, pad_token_id=0)
    candidate = Variant(original).with_transform(LeanLoop("decode"))
    assert exam.noise_kld > 1e-6, "steps and a full forward round alike here, so this shows nothing"
    found = judge(exam, candidate, "lossless")
    assert found.verdict is Verdict.PASS, found.reason
    assert found.mean_kld < 1e-6
    assert judge(exam, candidate, "strict").mean_kld > 1e-6


@pytest.mark.parametrize(
    ("dtype", "layers"), [(torch.bfloat16, 2), (torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 8)], ids=str
)
def test_rounding_that_grows_with_the_layers_hides_no_damage(dtype, layers, prompts):
    original = built(layers).to(dtype)
    exam = Exam.prepare(original, prompts, pad_token_id=0)
    same = judge(exam, Variant(original).with_transform(LeanLoop("decode")), "lossless")
    assert same.verdict is Verdict.PASS, same.reason
    assert same.mean_kld < 1e-6
    damaged = judge(exam, edited(original, scaled(1.05)), "lossless")
    assert damaged.verdict is Verdict.FAIL, damaged.reason


def test_texts_cross_powers_of_two_and_batches_are_ragged(exam):
    crossing = [any(len(t.context) < p <= len(t.context + t.scored) for p in (32, 64, 128)) for t in exam.texts]
    assert sum(crossing) >= len(crossing) // 2
    assert all(len({len(t.context) for t in batch}) > 1 for batch in exam.batches)
    assert [len(t.context) for t in exam.long] == [248, 248, 504, 504]
    assert len({t.context for t in exam.long}) == 4


def test_an_unknown_tier_names_the_known_ones(model, exam):
    with pytest.raises(ValueError, match="lossless, strict, relaxed, aggressive"):
        judge(exam, Variant(model), "perfect")


def test_divergence_by_hand():
    reference, candidate = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    found = compare_logits(reference, candidate, torch.tensor([0]))
    assert found.kld == pytest.approx([0.5 * math.log(3)], rel=1e-5)
    assert found.top_gap == pytest.approx([math.log(3)], rel=1e-5)
    assert found.delta_logp == pytest.approx([-math.log(3)], rel=1e-5)
    assert found.delta_p == pytest.approx([-0.5], rel=1e-5)


@pytest.mark.fault("A5")
@pytest.mark.parametrize("scale", [1e30, -1e30, 1e37])
def test_huge_logits_leave_finite_numbers(scale):
    logits = torch.randn(5, 50)
    found = compare_logits(logits, logits * scale, torch.arange(5))
    assert np.isfinite([found.kld, found.top_gap, found.delta_logp, found.delta_p]).all()
    assert found.kld.min() > 1


def test_tokens_that_the_original_rules_out_do_not_count():
    logits = torch.randn(3, 50)
    logits[:, 7] = -math.inf
    assert compare_logits(logits, logits, torch.arange(3)).kld == pytest.approx(0, abs=1e-6)
    assert find_defect(logits[None], logits[None]) is None


@pytest.mark.parametrize(
    ("texts", "expected"),
    [([[1, 2, 3, 4, 5, 6]], 0.0), ([[1] * 8], 0.8), ([[1, 2], []], 0.0), ([[1, 2] * 4, [*range(8)]], 0.3)],
)
def test_repetition(texts, expected):
    assert repetition(texts) == pytest.approx(expected)


def test_tokens_are_told_apart_by_how_sure_the_original_was():
    reference = torch.tensor([[0.0, 0.0, -9.0], [2.0, 0.5, -9.0], [9.0, 0.0, 0.0], [9.5, 0.0, 0.0]])  # 0.5, 0.8, 1, 1
    candidate = reference.clone()
    candidate[3] = torch.tensor([0.0, 9.5, 0.0])
    tally = Tally()
    tally.add(compare_logits(reference, candidate, torch.zeros(4, dtype=torch.long)), Text(0, (), (0,) * 4, ()), "own")
    open_, likely, settled = tally.certainty(tie_nats=0.05)
    edges = [(c.low, c.high, c.tokens) for c in (open_, likely, settled)]
    assert edges == [(0.0, 0.5, 1), (0.5, 0.9, 1), (0.9, 1.0, 2)]
    assert (open_.max_kld, likely.max_kld, open_.same_top) == (0.0, 0.0, 1.0)
    assert settled.max_kld == pytest.approx(9.5, rel=1e-2)
    assert (settled.same_top, settled.p50_kld) == (0.5, pytest.approx(settled.max_kld / 2))


@pytest.mark.parametrize(
    ("tier", "noise", "tokens", "limit"),
    [
        ("strict", 0.0, 1500, 1.005),
        ("strict", 0.0, 0, 1.005),
        ("strict", 1e-9, 1500, 1.005009),  # of FP32
        ("strict", 0.0018, 1500, 1.0120),  # of BF16: 0.18 % and twice 1.645 times 0.155 %
        ("strict", 0.0018, 150_000, 1.0073),  # the more is read, the less is excused
        ("lossless", 0.0018, 1500, 1.0080),
        ("relaxed", 0.0018, 1500, 1.0573),
    ],
)
def test_the_perplexity_limit_is_beyond_the_originals_own_noise(tier, noise, tokens, limit):
    exact = TIERS[tier].ppl_limit(noise, tokens)
    assert exact == pytest.approx(limit, abs=1e-4)
    same = {"mean_kld": 0.0, "mean_kld_high": 0.0, "p99_kld": 0.0, "same_top": 1.0, "same_top_low": 1.0}
    found = Quality(tier, Verdict.INCONCLUSIVE, "", **same, ppl_ratio=1.0, ppl_ratio_high=exact - 1e-6, tokens=tokens)
    exam = SimpleNamespace(noise_kld=noise)
    assert beyond(found, TIERS[tier], exam) is None
    assert "perplexity" in beyond(replace(found, ppl_ratio_high=exact + 1e-6), TIERS[tier], exam)


def brief_tally(kld: float, seed: int) -> Tally:
    """What a brief exam of a candidate at this mean KLD may draw: 112 tokens of 4 prompts, log-normal as measured."""
    draw = np.random.default_rng(seed)
    tally = Tally()
    for prompt in range(4):
        for stratum in ("prefill", "first-prompt" if prompt == 0 else "second-prompt", "padded-batch"):
            count = 4 if stratum == "padded-batch" else 12
            klds = kld * draw.lognormal(-0.5, 1.0, count)
            delta = draw.normal(-klds, np.sqrt(2 * klds))  # a log-likelihood ratio varies by twice the divergence
            changed = draw.random(count) < 0.019 * (kld / 0.0017) ** 0.5  # 1.9 % at 0.0017 nats: SmolLM2 at 8 bits
            found = Divergence(klds, np.where(changed, 0.2, 0.0), delta, delta / 3, np.full(count, 0.7))
            tally.add(found, Text(prompt, (), (0,) * 6, (0,) * (count - 6) if count > 6 else ()), stratum)
    return tally


@pytest.mark.parametrize(("kld", "fails"), [(0.0017, range(2)), (0.004, range(4)), (0.04, range(300, 301))])
def test_a_brief_exam_fails_what_broke_and_not_what_drew_unlucky_tokens(kld, fails):
    """The former limits failed 8-bit weights, which are well within the tier, in one brief exam of three."""
    exam = SimpleNamespace(noise_kld=0.0, tie_nats=0.05, size=SIZES["brief"])
    limits = TIERS["strict"].for_size(exam.size)
    verdicts = [decide(brief_tally(kld, seed), limits, exam).verdict for seed in range(300)]
    assert verdicts.count(Verdict.FAIL) in fails


def test_only_a_brief_exam_has_wider_limits():
    assert {name: TIERS["strict"].for_size(size) == TIERS["strict"] for name, size in SIZES.items()} == {
        "brief": False,
        "quick": True,
        "standard": True,
        "thorough": True,
    }
