"""Tune by a policy of one's own, and see what became of every candidate in it.

python examples/custom_policy.py                          # examples/chat.toml
python examples/custom_policy.py --policy my-policy.toml --budget 60
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import autotune

PROMPTS = [f"Question {i}: what is {i} times {i + 3}? Answer:" for i in range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--policy", default=Path(__file__).with_name("chat.toml"), help="a .toml file")
    parser.add_argument("--budget", type=float, help="seconds, instead of the policy's own")
    options = parser.parse_args()

    policy = autotune.Policy.load(options.policy)  # a PolicyError names file, step and the nearest spelling
    if options.budget is not None:
        policy = replace(policy, budget_s=options.budget)  # a policy is a value: change what you like
    print(f"{policy.name}: {policy.description} (tier {policy.tier}, budget {policy.budget_s} s)")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    autotune.wrap(model, tokenizer=tokenizer, policy=policy, workload=PROMPTS, when="blocking")

    for trial in model.autotune.report().to_dict()["trials"]:
        print(f"{trial['outcome']:13} {trial['transform']} @ {trial['phase']}: {trial['reason']}")
    print(model.autotune.status.detail)


if __name__ == "__main__":
    main()
