"""Compare ways to run a model on your own prompts: how much faster, how good still, and in which cases.

python examples/ab_experiment.py                      # SmolLM2-135M-Instruct from the hub
python examples/ab_experiment.py --model ./my-model   # any causal LM that transformers implements

The same, written down: autotune experiment run examples/ab_experiment.toml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import autotune
from autotune.transforms import make

SUBJECTS = "the tides", "a heap", "the moon", "yeast", "inflation", "a fugue", "chess", "rust"
PROMPTS = [
    f"{ask} {subject}" for ask in ("Explain in two sentences:", "Write a question about") for subject in SUBJECTS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--budget", type=float, default=180.0, metavar="SECONDS")
    parser.add_argument("--pairs", type=int, default=25, help="timed pairs per bucket and candidate, at most")
    parser.add_argument("--store", type=Path, help="where the experiment is kept; default in the cache directory")
    parser.add_argument("--chart", type=Path, help="draw speed against quality: .svg or .png")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    experiment = autotune.Experiment(
        "eager-attention",
        control=model,  # it is left as it is, whatever the candidates do
        candidates={
            "same": [],  # the control again: shows what chance alone can do
            "eager": make("attention", {"implementation": "eager"}),
        },
        tokenizer=tokenizer,
        workload=PROMPTS,
        new_tokens=16,
        batch_sizes=(1, 4),
        store=options.store,
    )
    result = experiment.run(budget_s=options.budget, pairs=options.pairs, progress=print)  # interrupted, it resumes

    print(result)
    print("worth a choice:", ", ".join(point.name for point in result.pareto()))
    if options.chart:
        result.chart(options.chart)


if __name__ == "__main__":
    main()
