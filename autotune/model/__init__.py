"""A live Hugging Face model as it is: how to intercept, copy, load and inspect it.

    seam/                     the only package that names the internals of transformers
    route                     routes a model's `forward` and decoding loop
    twins, stateful           structural copies that share every tensor; state that a model's forward writes
    revision                  whether a model changed since it was tuned
    linear_layers             where a model multiplies by weights
    placement, modes          where its weights are stored; thread modes in which the original serves all calls
    load, gguf, checkpoint    loads a model from a directory, a GGUF file or the hub
    shrink                    a tiny random model of the same class

Nothing here makes a model faster.
"""
