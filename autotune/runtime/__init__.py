"""What serves: variants of a model, and the parts that transforms build them from.

    variant              one way to run a model, copy-on-write; the contract of a transform
    loop                 the lean decoding loop: where a token is decoded
    attempt, traffic     one call with a way back to the original; live requests go before measurements
    token_clock          when the tokens of a live answer come
    cache/               KV caches: slots, pools of them, narrow ones
    steps/               decode steps: recorded (program/), compiled, captured
    speculation/         tokens guessed, and checked several at a time
    kernels/             C++ operators and the layers over them
    merged_blocks, widening, attention_sdpa    parts that replace a model's own

Nothing here measures or decides.
"""
