"""The documents as the tests read them: README.md and the pages of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.models import tiny

if TYPE_CHECKING:
    import pytest
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
SERVER = "http://127.0.0.1:8000"  # code that names it is run beside a server: tests/serve/test_documents.py
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model of the documents' code

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


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def marked(text: str, name: str) -> str:
    """What lies between the comments `name: begin` and `name: end`."""
    return text.split(f"<!-- {name}: begin -->\n")[1].split(f"\n<!-- {name}: end -->")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the first Markdown table in `text`, without its head."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def blocks(text: str, language: str = "python") -> list[str]:
    """The code blocks in `text`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Where the links in `text` lead, those to other sites apart."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors(text: str) -> set[str]:
    """The anchors of the headings in `text`, as GitHub and the site name them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def run(path: str, monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Run a document's Python, block after block, on a tiny model under a policy of seconds; its names afterwards."""
    name = folder / MODEL
    tiny(max_position_embeddings=1024, initializer_range=0.15).save_pretrained(name)  # found before the hub is asked
    tokenizer.save_pretrained(name)
    (folder / "policies").mkdir()
    (folder / "policies" / "balanced.toml").write_text(QUICK)
    monkeypatch.setenv("AUTOTUNE_POLICY_DIR", str(folder / "policies"))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "readme"}  # whose warnings are errors; see pyproject.toml
    for number, block in enumerate(each for each in blocks(read(path)) if SERVER not in each):
        exec(compile(block, f"{path}, python block {number}", "exec"), names)
    return names
