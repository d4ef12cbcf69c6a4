"""A live Hugging Face model, as it is found: how it is intercepted, copied, read and looked at.

    seam/                     the only place that names what is inside transformers
    route                     its `forward` and decoding loop, routed
    twins, stateful           structural copies that share every tensor; what a model's forward writes by itself
    revision                  whether it is still what it was when it was tuned
    linear_layers             where it multiplies by weights
    placement, modes          where its weights lie; modes of a thread under which calls are the original's
    load, gguf, checkpoint    from a directory, a GGUF file or the hub
    shrink                    a tiny random model of the same class

Nothing here makes a model faster.
"""
