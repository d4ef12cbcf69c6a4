"""What a phase costs and what limits it. Pure: values in, values out; `profile` measures.

costs        a profile, as values
work, parts  FLOPs and bytes of a model's modules, and which part of a model an operator belongs to
diagnosis    the bottleneck of each phase, with the evidence in a sentence
ceilings     how much faster a transform could make it at best
"""
