"""Variants of a model, which serve calls, and the parts that transforms build them from.

    variant              one way to run a model, copy-on-write; the contract of a transform
    loop                 the lean decoding loop: where a token is decoded
    attempt, traffic     one call that can fall back to the original; live requests go before measurements
    token_clock          when the tokens of a live answer arrive
    cache/               KV caches: slots, pools of them, narrow ones
    steps/               decode steps: recorded (program/), compiled, captured
    batching/            sequences of several callers decoded together
    speculation/         guessing tokens, and checking several at a time
    kernels/             C++ operators and the layers over them
    merged_blocks, widening, attention_sdpa    parts that replace a model's own

Nothing here measures or decides.
"""
