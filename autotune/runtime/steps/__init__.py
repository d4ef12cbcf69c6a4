"""Decode steps over slots. `step` is their type; `program`, `compiled`, `graphs` and `inductor_graphs` make them.

`compiled_prefill` is the same for prompts of any length.
"""
