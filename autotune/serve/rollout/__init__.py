"""A new plan on many replicas: one serves its share with it, then all do, or none.

    decision  what is seen of a canary, and what follows from it; what a replica does next. Pure
    tally     how the answers of this process went since a rollout began
    folder    the directory that the replicas share: the plan on offer, the rollout, everybody's figures, a lock
    record    the rollout as an experiment in its store
    replica   one replica's part: verify, serve, count, judge, follow

Replicas know each other by the directory alone, as they do while one of them tunes: no replica is special, and nothing
else has to run. The statistics are those of experiments (`autotune.compare.experiment`).
"""
