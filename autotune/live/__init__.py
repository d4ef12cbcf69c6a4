"""A wrapped model in service: `wrap` makes the `handle`, which observes, tunes, serves, and takes back.

    original    the original's weights: on the device, parked, or released
    again       when a search that noise may have misled is repeated
    status      where a wrapped model stands
    watch/      after commit: is the plan still as good and as fast?

What is proven comes from `tune`; nothing here measures a candidate.
"""
