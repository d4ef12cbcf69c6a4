"""Tune a model for your own prompts, then use it as before.

python examples/quickstart.py                      # SmolLM2-135M-Instruct from the hub
python examples/quickstart.py --model ./my-model   # any causal LM that transformers implements
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import autotune

SUBJECTS = "the tides", "a heap", "the moon", "yeast", "inflation", "a fugue", "chess", "rust"
PROMPTS = [
    f"{ask} {subject}" for ask in ("Explain in two sentences:", "Write a question about") for subject in SUBJECTS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub name")
    parser.add_argument("--policy", default="balanced", help="name of a policy or a .toml file")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    autotune.wrap(model, tokenizer=tokenizer, policy=options.policy, workload=PROMPTS, when="blocking", progress=print)
    print(model.autotune.status)

    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)  # the same call
    print(tokenizer.decode(output[0], skip_special_tokens=True))

    decode = model.autotune.report().to_dict()["phases"]["decode"]
    print(f"decode is {decode['bottleneck']}-bound: {decode['evidence']}")
    print(f"speed-up {decode['speedup']} ({decode['speedup_low']} to {decode['speedup_high']})")
    model.autotune.unwrap()  # the original again, without a trace


if __name__ == "__main__":
    main()
