"""A differential fuzzer: a wrapped model and a plain twin of it get the same, and must answer the same.

Read in this order:

    models     tiny random models whose weights every storage format holds exactly
    seen       one call as its caller sees it, and what sets two of them apart
    calls      kinds of calls: generate in its modes, forward, and what surrounds them
    changes    what may be done to a model between two calls, and how it is undone (adapters: what LoRA adds to that)
    modes      what a process may be set to
    failures   faults inside a plan that serves
    plans      what is committed, without a search
    machine    the sequences of all this, and what is asserted after each step
    reverts    faults that were mended once, each brought back by a patch: the fuzzer has to find them

`make fuzz MINUTES=10` runs it, `python -m tests.fuzz --reverts` proves it, tests/test_fuzz.py is a fixed part of it.
"""
