"""Continuous batching: calls of several threads share decode steps, and join and leave between them.

engine    one thread that owns prefill, decode and sampling; callers wait for it
request   one sequence of a caller: what it asked for, and what comes back
load      what the engine has to do and has done, as numbers
terms     how urgent a request is, until when, and whether it is still wanted
prefill   a prompt under way, part by part
prefixes  what prompts begin with alike is computed once
tokens    the latest token of every row, and the choice of the next ones
rows      which row a sequence takes, and how many rows a step computes (pure)
"""
