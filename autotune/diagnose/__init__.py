"""The costs of a phase and what limits it. Pure: values in, values out; `profile` measures.

costs        a profile, as values
work, parts  FLOPs and bytes of a model's modules, and which part of a model an operator belongs to
diagnosis    the bottleneck of each phase, with the evidence in a sentence
ceilings     upper bounds on the speed-up that a transform can give
"""
