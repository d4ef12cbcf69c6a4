"""A wrapped model in service: `wrap` makes the `handle`, which observes, tunes, serves and rolls back.

    original    the original's weights: on the device, parked, or released
    again       when to repeat a search that noise may have misled
    status      the state of a wrapped model
    watch/      after commit: is the plan still as good and as fast?

Plans come from `tune`, which measures and proves them; nothing here measures a candidate.
"""
