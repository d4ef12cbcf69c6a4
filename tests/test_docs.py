"""The documents do what they say: code runs, tables are those of the package, names exist, links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import autotune
from autotune import errors
from autotune.compare import check, experiment
from autotune.machine import versions
from autotune.machine.versions import TESTED
from autotune.model import route
from autotune.report import exit_codes as codes
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms import registry
from autotune.tune import policy as policies
from autotune.validate.tiers import TIERS
from tests import documents
from tests.models import tiny, token_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SLOW = {"guide"}  # it tunes
ELSEWHERE = {"serving"}  # its code needs a server: tests/serve/test_documents.py
WITH_CODE = [
    page.stem
    for page in documents.PAGES
    if page.stem not in ELSEWHERE and documents.blocks(documents.read(f"docs/{page.name}"))
]
HEAD = """
name = "shown"
description = "A step from the documents"
objective = "latency"
tier = "strict"
budget_s = 10
"""


# Code


def test_pages_with_code_are_found() -> None:
    assert {"guide", "experiments", "checks", "extending"} <= set(WITH_CODE)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in WITH_CODE]
)
def test_the_code_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = documents.run(f"docs/{page}.md", monkeypatch, tmp_path, tokenizer)
    assert not ("model" in names and route.is_routed(names["model"]))
    assert "result" not in names or names["result"].exit_code == 0


def test_the_transform_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = documents.run("docs/extending.md", monkeypatch, tmp_path, tokenizer)
    model, prompt = tiny("gpt2"), torch.tensor(token_prompts(1))
    variant = Variant(model).with_transforms((names["WithoutDropout"](),))
    assert variant.transforms[0].took_effect(variant) is None
    options = {"max_new_tokens": 8}
    assert torch.equal(serving(variant).generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("path", documents.ALL, ids=lambda path: path.name)
def test_policy_steps_are_valid(path: Path, tmp_path: Path) -> None:
    for step in documents.blocks(path.read_text(encoding="utf-8"), "toml"):
        (tmp_path / "shown.toml").write_text(HEAD + step)
        assert policies.check(tmp_path / "shown.toml").steps


# Tables


def transforms_table() -> str:
    lines = ["| transform | what it does | stage | lossless |", "|---|---|---|---|"]
    for name, cls in sorted(registry().items(), key=lambda item: (item[1].stage, item[0])):
        lines.append(f"| `{name}` | {cls.summary} | {cls.stage.name.lower()} | {'yes' if cls.lossless else 'no'} |")
    return "\n".join(lines)


def test_the_transforms_are_those_of_the_registry() -> None:
    assert documents.marked(documents.read("docs/tuning.md"), "transforms") == transforms_table()


def test_the_exit_codes_are_those_of_the_table() -> None:
    assert documents.marked(documents.read("docs/guide.md"), "codes") == codes.table()


def test_the_versions_that_count_as_tested_are_those_that_passed() -> None:
    shown = documents.marked(documents.read("docs/versions.md"), "versions")
    passed = [row[0] for row in documents.rows(shown) if row[-1] == "passed" and row[2] == "0"]
    found = {
        name: {versions.minor(each) for each in re.findall(rf"\b{name} ([0-9.]+)", " ".join(passed))} for name in TESTED
    }
    assert found == {name: set(minors) for name, minors in TESTED.items()}


def test_the_policies_are_those_that_are_shipped() -> None:
    table = documents.section(documents.read("docs/tuning.md"), "Policies")
    shown = {row[0].split("`")[1]: row[2] for row in documents.rows(table)}
    assert shown == {name: policies.load(name).tier for name in policies.available()}


def test_the_tiers_are_those_of_the_gate() -> None:
    def number(text: str) -> float:
        return float(text.removesuffix(" %")) / (100 if text.endswith("%") else 1)

    table = documents.section(documents.read("docs/tuning.md"), "Quality tiers")
    shown = {row[0]: tuple(map(number, row[1:5])) for row in documents.rows(table)}
    assert shown == {t.name: pytest.approx((t.mean_kld, t.p99_kld, t.same_top, t.ppl_ratio)) for t in TIERS.values()}


# Names


def test_the_api_has_every_public_name() -> None:
    found = set(re.findall(r"^::: (\S+)$", documents.read("docs/api.md"), re.MULTILINE))
    assert {f"autotune.{name}" for name in autotune.__all__} <= found
    assert {f"autotune.compare.check.{name}" for name in check.__all__} <= found
    parts = {*experiment.__all__} - {"Experiment"}  # which is at the top level
    assert {f"autotune.compare.experiment.{name}" for name in parts} <= found
    raised = [name for name, error in vars(errors).items() if isinstance(error, type) and issubclass(error, Exception)]
    assert {name.rpartition(".")[2] for name in found} >= {*raised, "Stage", "Blocker"}


@pytest.mark.parametrize("path", ["docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(path: str) -> None:
    """`tune/run.py` is the package's, `tests/models.py` the project's, and NAME stands for any."""
    named = {name for name in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", documents.read(path)) if "NAME" not in name}
    assert named
    package = documents.ROOT / "autotune"
    assert not [name for name in named if not ((package / name).exists() or (documents.ROOT / name).exists())]


@pytest.mark.parametrize("path", documents.ALL, ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", documents.read("Makefile"), re.MULTILINE))
    named = re.findall(r"(?:`|^    )make (?:PYTHON=\S+ )?([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


# Links


@pytest.mark.parametrize("path", documents.ALL, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """The anchors of the API page are made from docstrings: `make docs` checks links to those."""
    for link in documents.links(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), link
        assert documents.ROOT in page.parents, f"{link} leads out of the project"
        if anchor and not anchor.startswith("autotune."):
            assert anchor in documents.anchors(page.read_text(encoding="utf-8")), link
        if path in documents.PAGES and page not in documents.PAGES:
            assert page.is_file(), f"{link}: the site has copies of files, not of folders"


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"^  - (\S+\.md)$", documents.read("mkdocs.yml"), re.MULTILINE)
    assert sorted(menu) == [page.name for page in documents.PAGES]
    linked = {link.partition("#")[0] for link in documents.links(documents.read("docs/index.md"))}
    assert {*menu} - linked == {"index.md", "architectures.md"}  # the latter is a page of versions.md


def test_pip_installs_this_package_and_none_that_only_sounds_like_it() -> None:
    """The name `autotune` is another project's on PyPI."""
    own = tomllib.loads(documents.read("pyproject.toml"))["project"]["name"]
    kinds = ("*.py", "*.md", "*.html", "*.js", "*.yaml", "*.yml", "*.toml", "Makefile", "Containerfile")
    folders = ("autotune", "autotune_pytest", "benchmarks", "docs", "examples", "policies", "tests", ".ci", ".github")
    files = [file for folder in folders for kind in kinds for file in (documents.ROOT / folder).rglob(kind)]
    found = {
        (str(file.relative_to(documents.ROOT)), name)
        for file in [*files, *documents.ALL, documents.ROOT / "Makefile"]
        for line in file.read_text(encoding="utf-8").splitlines()
        for name in re.findall(r"(?<![\w./-])(autotune[\w-]*)(?=\[\w)", line)
        + re.findall(r"pip install (?:-\S+ )*[\"']?(autotune[\w-]*)", line)
    }
    assert len(found) >= 4
    assert {(file, name) for file, name in found if name != own} == set()
