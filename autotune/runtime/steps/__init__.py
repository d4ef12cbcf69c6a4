"""Decode steps over slots. `step` is their type; `program`, `compiled`, `graphs` and `inductor_graphs` make them.

`compiled_prefill` compiles prefill for prompts of any length.
"""
