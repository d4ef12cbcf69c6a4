"""Tune with a transform from outside the package.

pip install --no-build-isolation ./examples/custom_transform   # from then on `autotune transforms` lists it
python examples/custom_transform/run.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import autotune
from autotune.transforms import registry

PROMPTS = [f"The number {i} is called" for i in range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    options = parser.parse_args()

    print("found:", registry()["merged_mlp"].summary)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    policy = Path(__file__).with_name("merged.toml")
    autotune.wrap(model, tokenizer=tokenizer, policy=policy, workload=PROMPTS, when="blocking", cache=False)
    for trial in model.autotune.report().to_dict()["trials"]:
        print(f"{trial['outcome']}: {trial['transform']} @ {trial['phase']}: {trial['reason']}")


if __name__ == "__main__":
    main()
