"""The README does what it says: its code runs, and its tables are those of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from autotune.machine import versions
from autotune.machine.versions import TESTED
from autotune.model import route
from autotune.report import exit_codes
from autotune.runtime.variant import build, serving
from autotune.transforms import registry
from autotune.tune import policy as policies
from autotune.validate.tiers import TIERS
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


QUICK = """
name = "balanced"
description = "One question, in seconds"
objective = "latency"
tier = "strict"
budget_s = 10

[[steps]]
name = "narrower weights"
when = { phase = "decode" }
choices = [{ transform = "weight_storage", phase = "decode" }]
"""


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the first Markdown table in `text`, without its head."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


@pytest.mark.slow
def test_the_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    name = tmp_path / re.search(r'^name = "(.+)"$', README, re.MULTILINE)[1]  # type: ignore[index]
    tiny().save_pretrained(name)  # a directory of that name is what from_pretrained finds first
    tokenizer.save_pretrained(name)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "balanced.toml").write_text(QUICK)
    monkeypatch.setenv("AUTOTUNE_POLICY_DIR", str(tmp_path / "policies"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(CODE):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)
    assert not route.is_routed(names["model"])

    model, prompt = tiny("gpt2"), torch.tensor(token_prompts(1))
    variant = build(model, (names["WithoutDropout"](),))
    assert variant.transforms[0].took_effect(variant) is None
    options = {"max_new_tokens": 8}
    assert torch.equal(serving(variant).generate(prompt, **options), model.generate(prompt, **options))


def transforms_table() -> str:
    lines = ["| transform | what it does | stage | lossless |", "|---|---|---|---|"]
    for name, cls in sorted(registry().items(), key=lambda item: (item[1].stage, item[0])):
        lines.append(f"| `{name}` | {cls.summary} | {cls.stage.name.lower()} | {'yes' if cls.lossless else 'no'} |")
    return "\n".join(lines)


def test_the_transforms_are_those_of_the_registry() -> None:
    shown = README.split("<!-- transforms: begin -->\n")[1].split("\n<!-- transforms: end -->")[0]
    assert shown == transforms_table()


def test_the_exit_codes_are_those_of_the_table() -> None:
    assert README.split("<!-- codes: begin -->\n")[1].split("\n<!-- codes: end -->")[0] == exit_codes.table()


def test_the_versions_that_count_as_tested_are_those_that_passed() -> None:
    shown = README.split("<!-- versions: begin -->\n")[1].split("\n<!-- versions: end -->")[0]
    passed = [row[0] for row in rows(shown) if row[-1] == "passed" and row[2] == "0"]
    found = {
        name: {versions.minor(each) for each in re.findall(rf"\b{name} ([0-9.]+)", " ".join(passed))} for name in TESTED
    }
    assert found == {name: set(minors) for name, minors in TESTED.items()}


def test_the_policies_are_those_that_are_shipped() -> None:
    table = section("What it tries").split("| policy |")[1]
    shown = {row[0].split("`")[1]: row[2] for row in rows("| policy |" + table)}
    assert shown == {name: policies.load(name).tier for name in policies.available()}


def test_the_tiers_are_those_of_the_gate() -> None:
    def number(text: str) -> float:
        return float(text.removesuffix(" %")) / (100 if text.endswith("%") else 1)

    shown = {row[0]: tuple(map(number, row[1:5])) for row in rows(section("Quality tiers"))}
    assert shown == {t.name: pytest.approx((t.mean_kld, t.p99_kld, t.same_top, t.ppl_ratio)) for t in TIERS.values()}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
