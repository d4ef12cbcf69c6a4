"""Which layers stay wider: deciding on scripted divergences, then measuring on tiny models with one ruined layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from autotune.model.linear_layers import is_named
from autotune.runtime import kernels
from autotune.runtime.variant import Transform, Variant
from autotune.transforms.dynamic_int8 import DynamicInt8
from autotune.transforms.linears import LinearTransform, reusing
from autotune.transforms.weight_only import WeightOnly
from autotune.tune.refine import LayerGroup, Promises, fewest, kinds, narrowest, rank, refine, spell
from autotune.validate.exam import Exam
from autotune.validate.sensitivity import LayerProbe, longest
from autotune.validate.tally import summarise
from autotune.validate.texts import Text
from autotune.validate.tiers import Tier
from tests import models

KINDS = ("attn.q_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BLOCKS = tuple(f"model.layers.{k}.{kind}" for k in range(6) for kind in KINDS)
LAYERS = (*BLOCKS, "lm_head")
ALL = Promises(narrow=4.0, wide=2.0, least=1.0)  # any number of layers may stay wide


@dataclass
class ScriptedProbe:
    """Layers that cause what the test says, their sum when together; more than `limit` nats is too much."""

    nats: Mapping[str, float]
    limit: float = 0.005
    sizes: Mapping[str, int] = field(default_factory=dict)
    measured: list[tuple[str, ...]] = field(default_factory=list)
    wider: Any = None
    wider_form: str = "at 8 bits"

    @property
    def layers(self) -> dict[str, int]:
        return {name: self.sizes.get(name, 100) for name in LAYERS}

    def divergence(self, names: Collection[str]) -> float:
        self.measured.append(tuple(names))
        return sum(self.nats.get(name, 0.0) for name in names)

    def shortfall(self, wide: str) -> str | None:
        left = sum(nats for name, nats in self.nats.items() if not is_named(name, wide))
        return f"mean KLD is {left:.3f}" if left > self.limit else None

    def widened(self, wide: str) -> Any:
        return wide


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("nats", "first", "reason"),
    [
        ({"lm_head": 0.06}, "lm_head", "kept lm_head at 8 bits, 4% of the weights: alone it causes 0.06 of 0.06 nat"),
        ({"lm_head": 0.06, "model.layers.5.mlp.down_proj": 0.03}, "layers.5.mlp.down_proj,lm_head", "0.06 + 0.03 of"),
        (dict.fromkeys((n for n in BLOCKS if "q_proj" in n), 0.01), "q_proj", "kept q_proj at 8 bits, 24%"),
        ({"model.layers.2.attn.q_proj": 0.01, "lm_head": 0.004}, "layers.2.attn.q_proj", "0.01 of 0.014 nat"),
    ],
)
def test_the_fewest_layers_that_will_do_are_found(nats: dict[str, float], first: str, reason: str) -> None:
    found = refine(ScriptedProbe(nats), ALL, never)
    assert set(found.proposals[0].transform.split(",")) == set(first.split(","))  # type: ignore[attr-defined]
    assert reason in found.proposals[0].reason


def test_each_further_proposal_leaves_more_layers_wider() -> None:
    nats = dict.fromkeys(LAYERS[:6], 0.01)
    found = refine(ScriptedProbe(nats, limit=0.03), ALL, never)
    promised = [proposal.predicted for proposal in found.proposals]
    assert promised == sorted(promised, reverse=True)
    assert len(promised) > 1


@pytest.mark.parametrize(
    ("probe", "promises", "finding"),
    [
        (ScriptedProbe({}), Promises(4.0, 1.0, 3.9), "with more than 0.9% of its weights at 8 bits it promises less"),
        (ScriptedProbe({}), Promises(4.0, 1.0, 4.5), "with more than 0.0% of its weights at 8 bits it promises less"),
        (
            ScriptedProbe({"lm_head": 0.06}, sizes={"lm_head": 2400}),
            Promises(4.0, 2.0, 3.0),
            "lm_head alone causes 0.06 of 0.06 nat, but holds 50% of the weights, 33% may stay wider",
        ),
        (
            ScriptedProbe(dict.fromkeys(LAYERS, 0.1)),
            Promises(4.0, 2.0, 3.0),
            "even with",
        ),
        (ScriptedProbe(dict.fromkeys(LAYERS, 0.1)), ALL, "mean KLD is 0."),
        (ScriptedProbe({"lm_head": float("inf")}, sizes={"lm_head": 2400}), Promises(4.0, 2.0, 3.0), "inf of inf nat"),
    ],
)
def test_where_nothing_helps_the_finding_says_what_was_tried(
    probe: ScriptedProbe, promises: Promises, finding: str
) -> None:
    found = refine(probe, promises, never)
    assert found.proposals == ()
    assert finding in found.finding


@pytest.mark.parametrize("nats", [{}, {"lm_head": 1.0}, dict.fromkeys(LAYERS, 1.0)], ids=["none", "one", "all"])
def test_measuring_is_bounded(nats: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.tune.refine.SPLIT_SHARE", 0.0)
    monkeypatch.setattr("autotune.tune.refine.MOST_MEASURED", 9)
    probe = ScriptedProbe(nats)
    parts = rank(probe, never)
    assert len(probe.measured) <= 9 + 3
    assert sorted(name for part in parts for name in part.layers) == sorted(LAYERS)
    assert sum(part.share for part in parts) == pytest.approx(1)


def test_when_time_is_up_what_was_measured_decides() -> None:
    found = refine(ScriptedProbe({"model.layers.5.mlp.down_proj": 0.1}), ALL, lambda: True)
    assert found.proposals[0].transform == "down_proj"  # not split any further


@pytest.mark.parametrize("least", range(1, 9))
def test_bisection(least: int) -> None:
    assert fewest(8, lambda k: k >= least) == least


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (["lm_head"], "lm_head"),
        ([name for name in LAYERS if "q_proj" in name], "q_proj"),
        ([name for name in LAYERS if "mlp" in name], "mlp"),
        (["model.layers.3.mlp.down_proj"], "layers.3.mlp.down_proj"),
        ([name for name in LAYERS if ".3." in name], "layers.3"),
        (["model.layers.1.attn.q_proj", "model.layers.2.attn.q_proj"], "layers.1.attn.q_proj,layers.2.attn.q_proj"),
        (list(BLOCKS), "model"),
    ],
)
def test_names_are_spelt_as_shortly_as_they_can_be(chosen: list[str], text: str) -> None:
    spelt = spell(chosen, LAYERS)
    assert sorted(spelt.split(",")) == sorted(text.split(","))
    assert [name for name in LAYERS if is_named(name, spelt)] == chosen


def test_layers_of_a_kind_belong_together() -> None:
    assert kinds(["h.0.a", "h.1.a", "h.0.b", "head"]) == (("h.0.a", "h.1.a"), ("h.0.b",), ("head",))


@pytest.mark.parametrize(("narrow", "wide", "least"), [(4.0, 2.0, 3.0), (4.0, 1.0, 1.03), (3.0, 2.9, 2.95)])
def test_room_is_where_the_promise_falls_to_the_least(narrow: float, wide: float, least: float) -> None:
    promises = Promises(narrow, wide, least)
    assert promises.mixed(promises.room) == pytest.approx(least)
    assert promises.mixed(0) == pytest.approx(narrow)
    assert promises.mixed(1) == pytest.approx(wide)


# --- on models ---


def ruined(architecture: str, norm: str, layer: str) -> Any:
    """A tiny model with huge weights in one layer, for inputs that are always zero.

    They change no output, and coarsen the steps of all weights that share a scale with them.
    """
    model = models.tiny(architecture, initializer_range=0.1)
    scale, linear = model.get_submodule(norm), model.get_submodule(layer)
    with torch.no_grad():
        scale.weight[::32] = -1.0 if architecture == "gemma3" else 0.0  # Gemma multiplies by one more than its weight
        if architecture == "gpt2":
            scale.bias[::32] = 0.0
            linear.weight[::32] = 20.0  # [in, out]
        else:
            linear.weight[:, ::32] = 20.0
    return model


def probe_of(model: Any, transform: LinearTransform, tier: str = "relaxed", lengths: Any = (48,) * 16) -> LayerProbe:
    whole = models.token_prompts(16, max(lengths))
    prompts = [prompt[:length] for prompt, length in zip(whole, lengths, strict=True)]
    exam = Exam.prepare(model, prompts, pad_token_id=models.PAD)
    assert exam.problem is None
    return LayerProbe(exam, Variant(model), transform, tier)


@pytest.fixture
def built() -> None:
    if reason := kernels.available():
        pytest.skip(reason)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("phase", ["decode", "both"])
@pytest.mark.parametrize(
    ("architecture", "norm", "layer"),
    [
        ("llama", "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.0.ln_2", "transformer.h.0.mlp.c_fc"),
        ("gemma3", "model.layers.0.input_layernorm", "model.layers.0.self_attn.v_proj"),
        ("mixtral", "model.layers.1.input_layernorm", "model.layers.1.self_attn.v_proj"),
    ],
)
def test_the_ruined_layer_is_the_one_that_is_found(architecture: str, norm: str, layer: str, phase: Any) -> None:
    model = ruined(architecture, norm, layer)
    with reusing():
        parts = rank(probe_of(model, WeightOnly(phase=phase, bits=4)), never)
    assert parts[0].layers == (layer,)
    assert parts[0].nats > sum(part.nats for part in parts[1:])


@pytest.mark.usefixtures("built")
def test_mamba_is_read_without_a_cache_of_keys() -> None:
    probe = probe_of(models.tiny("mamba"), WeightOnly(bits=8, phase="decode"))
    assert 0 < probe.divergence(tuple(probe.layers)) < 0.1


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("texts", "together"), [(10.0, 4), (2.5, 2), (0.1, 1)])
def test_of_a_large_vocabulary_fewer_texts_are_read_together(
    texts: float, together: int, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = probe_of(llama, WeightOnly(bits=4, phase="decode"))
    expected, width = plain.divergence(tuple(plain.layers)), plain.batches[0].shape[1]
    monkeypatch.setattr("autotune.validate.sensitivity.READ_BYTES", int(texts * 4 * width * models.VOCABULARY))
    probe, read = probe_of(llama, WeightOnly(bits=4, phase="decode")), list[int]()
    whole = probe._read
    monkeypatch.setattr(probe, "_read", lambda variant, ids: read.append(len(ids)) or whole(variant, ids))
    assert probe.divergence(tuple(probe.layers)) == pytest.approx(expected, rel=0.01)
    assert set(read) == {together}


@pytest.mark.parametrize(
    ("lengths", "kept", "width"),
    [
        ([200] * 16, 16, 96),
        ([200] * 15 + [4], 15, 96),
        ([96, 4] * 8, 8, 96),
        ([96] * 6 + [64] * 10, 16, 64),  # 1024 tokens are more than 576
        ([96] + [20] * 15, 16, 20),
        ([20] * 16, 16, 20),
    ],
)
def test_a_few_short_texts_do_not_shorten_the_others(lengths: list[int], kept: int, width: int) -> None:
    texts = [Text(number, (5,) * (length - 2), (6,), (7,)) for number, length in enumerate(lengths)]
    found = longest(texts)
    assert found == ([text for text in texts if len(text.context) + 2 >= width], width)
    assert len(found[0]) == kept


@pytest.mark.usefixtures("built")
def test_the_probe_reads_the_texts_that_it_compares_with_their_own_reference(llama: Any) -> None:
    probe = probe_of(llama, WeightOnly(bits=8, phase="decode"), lengths=(2, *(64,) * 15))
    tally, chosen = probe._tally(probe.transform, texts=16), [text.prompt for text in probe.texts]
    short = min(probe.exam.texts, key=lambda text: len(text.context)).prompt
    assert list(dict.fromkeys(tally.prompts().tolist())) == chosen
    assert short not in chosen
    assert len(chosen) > 8
    assert float(tally.column("kld").mean()) < 0.01


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("length", "said"), [(64, "mean KLD may be as high as"), (4, None)])
def test_few_tokens_show_clear_failures_only(length: int, said: str | None, llama: Any) -> None:
    """Where few are read, the bound of a good scheme may be over the limit. The gate scores more of them."""
    probe = probe_of(llama, WeightOnly(bits=4, phase="decode"), lengths=(length,) * 16)
    found = summarise(probe._tally(probe.transform, texts=16), "strict", 0.0)
    between = (found.mean_kld + found.mean_kld_high) / 2
    probe.tier = Tier("made up", mean_kld=between, p99_kld=math.inf, same_top=0.0, ppl_ratio=math.inf)
    assert (probe.shortfall("") or "").startswith(said or "")
    assert (probe.shortfall("") is None) == (said is None)
    probe.tier = replace(probe.tier, mean_kld=found.mean_kld / 2)
    assert "mean KLD" in (probe.shortfall("") or "")


@pytest.mark.usefixtures("built")
def test_left_wider_a_model_is_closer(llama: Any) -> None:
    probe = probe_of(llama, WeightOnly(bits=4, phase="decode"), tier="strict")
    assert "mean KLD" in (probe.shortfall("lm_head") or "")
    eight = probe_of(llama, WeightOnly(bits=8, phase="decode"), tier="strict")
    assert eight.shortfall("lm_head,layers.1,mlp,k_proj,v_proj,o_proj") is None  # all but one layer in FP16


FOUR, SIX = WeightOnly("decode", bits=4), WeightOnly("decode", bits=6)


@pytest.mark.parametrize(
    ("transform", "keep_tier", "asked", "form"),
    [
        (FOUR, {SIX}, [SIX], replace(FOUR, wide_as="int6")),
        (FOUR, set(), [SIX], FOUR),
        (replace(FOUR, wide="lm_head"), {SIX}, [], replace(FOUR, wide="lm_head")),  # those layers have 8 bits
        (SIX, set(), [], SIX),
        (WeightOnly("decode"), set(), [], WeightOnly("decode")),
    ],
    ids=str,
)
def test_sensitive_layers_get_the_narrowest_form_that_keeps_the_tier(
    transform: Transform, keep_tier: set[Transform], asked: list[Transform], form: Transform
) -> None:
    probed = list[Transform]()

    def probe(each: Transform) -> Any:
        probed.append(each)
        return ScriptedProbe({} if each in keep_tier else {"lm_head": 0.06}, wider=each)

    chosen: Any = narrowest(transform, probe)
    assert chosen.wider == form
    assert probed == [*asked, form]


def test_layers_that_cannot_be_left_out_have_no_probe() -> None:
    assert narrowest(FOUR, lambda each: None) is None


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("transform", "forms"),
    [
        (WeightOnly(bits=4, wide="lm_head"), (kernels.Int8Linear, kernels.Int4Linear)),
        (WeightOnly(bits=4, wide="lm_head", wide_as="int6"), (kernels.Int6Linear, kernels.Int4Linear)),
        (WeightOnly(bits=6).widened("lm_head"), (kernels.Int8Linear, kernels.Int6Linear)),
        (WeightOnly(bits=8, wide="lm_head"), (kernels.HalfLinear, kernels.Int8Linear)),
        (WeightOnly(bits=8, wide="lm_head", skip="lm_head"), (torch.nn.Linear, kernels.Int8Linear)),
        (WeightOnly(bits=8).widened("lm_head"), (kernels.HalfLinear, kernels.Int8Linear)),
        (DynamicInt8().widened("lm_head"), (torch.nn.Linear, DynamicInt8().kind)),
    ],
    ids=str,
)
def test_what_a_wider_layer_becomes(transform: LinearTransform, forms: tuple[type, type], llama: Any) -> None:
    variant = Variant(llama).with_transform(transform)
    twin = variant.modules["decode"]
    assert (type(twin.lm_head), type(twin.model.layers[1].mlp.down_proj)) == forms
    assert transform.took_effect(variant) is None


@pytest.mark.usefixtures("built")
def test_variants_that_differ_in_a_layer_share_the_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    exchange: Callable[..., Any] = WeightOnly.exchange
    monkeypatch.setattr(WeightOnly, "exchange", lambda self, linear: made.append(linear) or exchange(self, linear))
    with reusing():
        first = Variant(llama).with_transform(WeightOnly(bits=4)).modules["decode"]
        narrow = len(made)
        second = Variant(llama).with_transform(WeightOnly(bits=4, wide="lm_head")).modules["decode"]
    assert len(made) == narrow + 1
    assert first.model.layers[0].mlp.up_proj is second.model.layers[0].mlp.up_proj
    last = Variant(llama).with_transform(WeightOnly(bits=4, wide="lm_head"))
    assert len(made) == 2 * narrow + 1, "outside, nothing is kept"
    with reusing(last):
        again = Variant(llama).with_transform(WeightOnly(bits=4, wide="lm_head")).modules["decode"]
        assert len(made) == 2 * narrow + 1, "what a variant has is used again, wider layers as well"
    assert again.lm_head is last.modules["decode"].lm_head


def test_parts_are_ordered_by_what_they_cause_for_their_bytes() -> None:
    probe = ScriptedProbe({"lm_head": 0.02, BLOCKS[0]: 0.01}, sizes={"lm_head": 10_000})
    parts = rank(probe, never)
    assert parts[0] == LayerGroup((BLOCKS[0],), pytest.approx(100 / 12_400), 0.01)
