"""Policies: the built-in ones load, a user's own add or override, and every slip is an error that helps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autotune import transforms
from autotune.errors import PolicyError
from autotune.machine import gpus
from autotune.tune import conditions, policy
from autotune.tune.budget import GrowingBudget, least
from autotune.tune.policy import BUILT_IN, Batching, Choice, PolicyStep
from autotune.validate.limits import Limits

NAMES = ["balanced", "latency", "lossless", "memory", "throughput"]
MINE = """
name = "mine"
description = "My own"
objective = "latency"
tier = "strict"
budget_s = 60

[limits]
min_gain = 0.1

[[steps]]
name = "one"
when = { phase = "decode", bottleneck = ["memory", "mixed"], device = ["cpu"] }
choices = [
    { transform = "attention", implementation = "eager" },
    { transform = "threads", phase = "decode", count = 1 },
]

[[steps]]
name = "two"
when = { phase = "prefill" }
choices = [{ transform = "threads" }]
"""


@pytest.fixture(autouse=True)
def _no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOTUNE_POLICY_DIR", raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = MINE, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def test_the_built_in_policies() -> None:
    assert list(policy.available()) == NAMES
    assert policy.load("balanced").tier == "strict"
    assert policy.load("lossless").tier == "lossless"


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_policy_is_sound(name: str) -> None:
    loaded = policy.load(name)
    assert loaded.name == name
    assert loaded.source == str(BUILT_IN / f"{name}.toml")
    assert least(loaded.budget_s) >= 60
    assert len({step.name for step in loaded.steps}) == len(loaded.steps)
    assert {step.phase for step in loaded.steps} == {"prefill", "decode"}
    for step in loaded.steps:
        made = [transforms.make(c.transform, c.params, c.phase) for c in step.choices]
        assert len(set(made)) == len(made)
        assert all(step.phase in transform.phases for transform in made), f"{step.name} tries what cannot help it"


def test_memory_never_keeps_a_copy_per_phase() -> None:
    for step in policy.load("memory").steps:
        for choice in step.choices:
            keeps = transforms.registry()[choice.transform].stage is transforms.Stage.WEIGHTS
            converts = choice.transform in (
                "linear_bf16",
                "wide_arithmetic",
                "flat_linears",
            )  # as it multiplies, over what is there
            assert choice.phase == "both" or converts or not keeps


@pytest.mark.parametrize("name", NAMES)
def test_hqq_comes_before_plain_int4_on_a_gpu(name: str) -> None:
    for step in policy.load(name).steps:
        schemes = [choice.params.get("scheme") for choice in step.choices]
        if step.devices == {"cuda"} and "int4_weight_only" in schemes:
            assert "int4_hqq" in schemes[: schemes.index("int4_weight_only")]


def test_lossless_computes_in_no_lower_precision() -> None:
    lossless = policy.load("lossless")
    used = {c.transform for step in lossless.steps for c in step.choices}
    assert not used & {"dynamic_int8", "torchao", "bitsandbytes", "linear_dtype", "linear_bf16"}
    assert lossless.tier == "lossless"  # which weights stored in 4 or 8 bits pass where the model was published so


def test_a_file_becomes_a_policy(write: Callable[..., Path]) -> None:
    path = write()
    assert policy.check(path) == policy.Policy(
        name="mine",
        description="My own",
        objective="latency",
        tier="strict",
        limits=Limits(min_gain=0.1),
        budget_s=60.0,
        steps=(
            PolicyStep(
                "one",
                "decode",
                (Choice("attention", {"implementation": "eager"}), Choice("threads", {"count": 1}, "decode")),
                frozenset({"memory", "mixed"}),
                frozenset({"cpu"}),
            ),
            PolicyStep("two", "prefill", (Choice("threads"),)),
        ),
        source=str(path),
    )
    assert policy.load(path) == policy.load(str(path)) == policy.check(str(path))


def test_a_budget_may_grow_with_the_model(write: Callable[..., Path]) -> None:
    grows = "budget_s = { base_s = 60, per_billion_s = 20, decode_steps = 5000.5, most_s = 600 }"
    assert policy.check(write(MINE.replace("budget_s = 60", grows))).budget_s == GrowingBudget(60, 20, 5000.5, 600)


def test_callers_may_be_decoded_together(write: Callable[..., Path]) -> None:
    asked = (
        "[batching]\nmax_batch = 8\nmax_queue = 32\nmax_wait_ms = 5\nmax_tpot_ms = 50.5\nmax_kv_mb = 512\n\n[limits]"
    )
    assert policy.check(write(MINE.replace("[limits]", asked))).batching == Batching(8, 32, 5.0, 50.5, 512.0)
    assert {name: policy.load(name).batching.max_batch for name in policy.available()} == {
        name: 16 if name == "throughput" else 1 for name in policy.available()
    }


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_users_directory_adds(
    by: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write().parent
    if by == "environment":
        monkeypatch.setenv("AUTOTUNE_POLICY_DIR", str(folder))
    extra = folder if by == "argument" else None
    assert list(policy.available(extra)) == [*NAMES, "mine"]
    assert policy.load("mine", extra).description == "My own"
    assert not caplog.records


def test_overriding_a_built_in_warns_and_names_both_files(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(MINE.replace('name = "mine"', 'name = "balanced"'), "balanced")
    assert policy.load("balanced", path.parent).description == "My own"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert str(BUILT_IN / "balanced.toml") in record.getMessage()


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="does not exist"):
        policy.available(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("balance", "no policy 'balance', did you mean 'balanced'.; available: balanced, latency"),
        ("xyz", "no policy 'xyz'; available"),
        ("", "no policy ''"),
        ("no/such/file.toml", "no/such/file.toml: cannot be read"),
        ("../policies/balanced", "cannot be read"),
    ],
)
def test_an_unknown_policy_is_an_error(name: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        policy.load(name)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "mine"', "", "name is missing; expected text"),
        ('name = "mine"', 'name = "yours"', "name is 'yours'; a policy is called as its file, 'mine'"),
        ('description = "My own"', "description = 3", "description is 3; expected text"),
        ('objective = "latency"', 'objective = "latenc"', "unknown objective 'latenc', did you mean 'latency'"),
        ('objective = "latency"', "objective = []", r"objective is \[\]; expected text"),
        ('tier = "strict"', 'tier = "strickt"', "unknown tier 'strickt', did you mean 'strict'.; known: lossless"),
        ("budget_s = 60", "", "budget_s is missing; expected a number"),
        ("budget_s = 60", 'budget_s = "5m"', "budget_s is '5m'; expected a number"),
        ("budget_s = 60", "budget_s = -1", "budget_s is -1"),
        ("budget_s = 60", "budget_s = inf", "budget_s is inf"),
        ("budget_s = 60", "budget_s = nan", "budget_s is nan"),
        ("budget_s = 60", "budget_s = true", "budget_s is True"),
        ("budget_s = 60", "budget_s = { base_s = 60 }", "budget_s: per_billion_s is missing; expected a number"),
        ("budget_s = 60", "budget_s = { base = 60 }", "budget_s: unknown key 'base', did you mean 'base_s'"),
        ("budget_s = 60", "budgets = 60", "unknown key 'budgets', did you mean 'budget_s'"),
        ("[limits]", "[batching]\nmax_batch = 0\n[limits]", "max_batch is 0; expected a whole number, from 1 to 64"),
        ("[limits]", "[batching]\nmax_batch = 2.5\n[limits]", "max_batch is 2.5; expected a whole number"),
        ("[limits]", "[batching]\nmax_queue = true\n[limits]", "max_queue is True; expected a whole number, 1 or more"),
        ("[limits]", "[batching]\nmax_wait_ms = -1\n[limits]", "max_wait_ms is -1; expected a number, 0 or more"),
        ("[limits]", "[batching]\nmax_wait = 1\n[limits]", "unknown key 'max_wait', did you mean 'max_wait_ms'"),
        ("budget_s = 60", "budget_s = 60\nbatching = 8", r"\[batching\]: expected a table, found 8"),
        ("min_gain", "min_gains", r"\[limits\]: unknown key 'min_gains', did you mean 'min_gain'"),
        ("min_gain = 0.1", "min_gain = -0.1", r"\[limits\]: min_gain is -0.1"),
        ("[limits]\nmin_gain = 0.1", "limits = 3", r"\[limits\]: expected a table, found 3"),
        ('name = "one"', "", "step 1: name is missing"),
        ('name = "one"', 'name = "one"\nwhn = 1', r"step 1 \(one\): unknown key 'whn', did you mean 'when'"),
        ('when = { phase = "prefill" }', "", r"step 2 \(two\): when is missing"),
        ('when = { phase = "prefill" }', "when = {}", r"step 2 \(two\), when: phase is missing"),
        (
            'phase = "prefill"',
            'phase = "prefil"',
            r"step 2 \(two\), when: unknown phase 'prefil', did you mean 'prefill'",
        ),
        (
            "bottleneck = [",
            "bottlenecks = [",
            r"step 1 \(one\), when: unknown key 'bottlenecks', did you mean 'bottleneck'",
        ),
        (
            '["memory", "mixed"]',
            '["memroy"]',
            r"step 1 \(one\), when: unknown bottleneck 'memroy', did you mean 'memory'",
        ),
        ('["memory", "mixed"]', '"memory"', "bottleneck is 'memory'; expected a list"),
        ('["memory", "mixed"]', "[1]", "bottleneck is 1; expected text"),
        ('["cpu"]', '["cpus"]', "unknown device 'cpus', did you mean 'cpu'"),
        ('[{ transform = "threads" }]', "[]", r"step 2 \(two\): choices is missing or empty"),
        ('[{ transform = "threads" }]', '["threads"]', r"step 2 \(two\): choices is missing or empty"),
        ('{ transform = "threads" }', "{ count = 1 }", r"step 2 \(two\), choice 1: transform is missing"),
        (
            '{ transform = "threads" }',
            '{ transform = "thread" }',
            "choice 1: no transform 'thread', did you mean 'threads'",
        ),
        (
            '{ transform = "threads" }',
            '{ transform = "threads", cuont = 1 }',
            "no parameter 'cuont', did you mean 'count'",
        ),
        (
            '"decode", count',
            '"decod", count',
            r"step 1 \(one\), choice 2: threads: phase is 'decod', did you mean 'decode'",
        ),
        ("count = 1", 'count = "1"', r"step 1 \(one\), choice 2: threads: count must be int, not '1'"),
        ("count = 1", "count = 0", r"step 1 \(one\), choice 2: threads: count must be at least 1"),
        (
            'phase = "decode", count',
            'phase = "prefill", count',
            r"step 1 \(one\), choice 2: threads is applied to prefill, and the step is to make decode faster: "
            r"give it phase = \"decode\" or \"both\"",
        ),
        ('name = "two"', 'name = "one"', "steps 1 and 2 are both called 'one': rename one of them"),
        ("count = 1", "count = ", "cannot be read as TOML"),
        ('name = "one"', 'name = "one"\nname = "two"', "cannot be read as TOML"),
    ],
)
def test_a_slip_is_an_error_that_helps(old: str, new: str, says: str, write: Callable[..., Path]) -> None:
    assert old in MINE
    path = write(MINE.replace(old, new, 1))
    with pytest.raises(PolicyError, match=says) as caught:
        policy.check(path)
    assert str(caught.value).startswith(str(path))


def test_a_policy_made_in_code_is_checked_too() -> None:
    loaded = policy.load("balanced")
    with pytest.raises(PolicyError, match=r"balanced\.toml: steps 1 and 2 are both called 'half precision'"):
        replace(loaded, steps=loaded.steps[:1] * 2)
    with pytest.raises(PolicyError, match=r"policy 'mine', step 1 \(one\), choice 1: threads is applied to prefill"):
        replace(
            loaded, name="mine", source="", steps=(PolicyStep("one", "decode", (Choice("threads", {}, "prefill"),)),)
        )


WHEN = 'when = { phase = "prefill" }'


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        (
            'device = ["cuda"], capability = ["hoper"]',
            "unknown architecture 'hoper', did you mean 'hopper'.; known:",
        ),
        ('device = ["cuda"], capability = ["9"]', "unknown architecture '9'; known: volta, .*blackwell, a capability"),
        ('device = ["cuda"], capability = ["=> 8.0"]', "unknown architecture '=> 8.0'"),
        (
            'device = ["cuda"], capability = [">= 8"]',
            "'>= 8' is not a bound; expected .* capability such as 8.0",
        ),
        ('device = ["cuda"], capability = [">= 9.0, < 8.0"]', "nothing is within '>= 9.0, < 8.0'"),
        ('device = ["cuda"], capability = [9.0]', "capability is 9.0; expected text"),
        ('device = ["cuda"], capability = "hopper"', "capability is 'hopper'; expected a list"),
        ('device = ["cpu", "cuda"], capability = ["ada"]', "a capability is a GPU's"),
        ('parameters = "big"', "parameters: 'big' is not a bound; expected >=, >, <= or < and a number such as 3e9"),
        ('parameters = ">= 3B"', "'>= 3B' is not a bound"),
        ('parameters = "> 3e9, <= 3e9"', "nothing is within"),
        ("parameters = 3e9", "parameters is 3000000000.0; expected text"),
        ('capabilty = ["ada"]', "unknown key 'capabilty', did you mean 'capability'"),
        ('parameter = ">= 1"', "unknown key 'parameter', did you mean 'parameters'"),
    ],
)
def test_a_slip_in_a_condition_names_the_step(condition: str, says: str, write: Callable[..., Path]) -> None:
    with pytest.raises(PolicyError, match=says) as caught:
        policy.check(write(MINE.replace(WHEN, f'when = {{ phase = "prefill", {condition} }}')))
    assert "step 2 (two), when" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("hopper", ["9.0"], ["8.9", "10.0"]),
        ("Ampere", ["8.0", "8.6", "8.7"], ["7.5", "8.9"]),
        ("blackwell", ["10.0", "10.3", "12.0"], ["9.0"]),
        ("8.6", ["8.6"], ["8.0", "8.9"]),
        (">= 8.9", ["8.9", "10.0"], ["8.7"]),
        (">= 8.0, < 9.0", ["8.0", "8.9"], ["7.5", "9.0"]),
        ("> 8.0", ["8.6"], ["8.0"]),
    ],
)
def test_capabilities(text: str, inside: list[str], outside: list[str]) -> None:
    wanted = conditions.of_capabilities(text)
    assert [wanted.admits(gpus.parse(number)) for number in inside + outside] == (
        [True] * len(inside) + [False] * len(outside)
    )


def test_conditions_become_ranges(write: Callable[..., Path]) -> None:
    condition = (
        'when = { phase = "prefill", device = ["cuda"], capability = ["ada", ">= 10.0"], parameters = ">= 3e9" }'
    )
    step = policy.check(write(MINE.replace(WHEN, condition))).steps[1]
    assert [str(wanted) for wanted in step.capabilities] == ["ada", ">= 10.0"]
    assert step.parameters is not None
    assert [step.parameters.admits(size) for size in (1e9, 3e9, 8e9)] == [False, True, True]


@pytest.mark.parametrize("steps", ["", "steps = []", "steps = 3", "steps = [1]", "[steps]"])
def test_a_policy_without_steps_is_an_error(steps: str, write: Callable[..., Path]) -> None:
    header = MINE[: MINE.index("[limits]")]
    with pytest.raises(PolicyError, match="steps is missing or not a list of tables"):
        policy.check(write(header + steps))


def test_a_file_of_an_editor_that_marks_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE, encoding="utf-8-sig")
    assert policy.check(path).name == "mine"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b"a = " + b"[" * 100_000, b""])
def test_what_is_no_policy_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=str(path)):
        policy.check(path)
