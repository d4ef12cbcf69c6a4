"""Record how a model answers, then let later versions of it be checked against that.

python examples/quality_check.py                      # SmolLM2-135M-Instruct from the hub
python examples/quality_check.py --model ./my-model   # any causal LM that transformers implements
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.compare import check


def damage(model: torch.nn.Module) -> str:
    """Scale the matrix in the middle of the model, as a wrong conversion might. Returns its name."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    name, matrix = matrices[len(matrices) // 2]
    with torch.no_grad():
        matrix.mul_(3)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--prompts", type=Path, help="text, a prompt a line, or .jsonl; default: built-in texts")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    with tempfile.TemporaryDirectory() as folder:
        baseline = check.record(
            model, Path(folder) / "baseline", tokenizer=tokenizer, prompts=options.prompts, latency=False
        )
        same = check.run(model, baseline, tokenizer=tokenizer)
        print(f"{same.verdict}: {same.reason}")

        name = damage(model)
        worse = check.run(model, baseline, tokenizer=tokenizer)
        print(f"{worse.verdict}: {worse.reason}")
        where = worse.localised.first_layer if worse.localised else None
        print(f"{name} was damaged, {where} was found")


if __name__ == "__main__":
    main()
