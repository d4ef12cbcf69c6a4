"""A wrapped model in service: `wrap` makes the `handle`, which observes, tunes, serves and rolls back.

    tuning      when to tune, and on whose behalf
    winner      what tuning found, and putting it into service
    serving     each call: by the plan, or by the original
    submit      requests that stream
    original    the original's weights: on the device, parked, or released
    again       when to repeat a search that noise may have misled
    status      the state of a wrapped model
    watch/      after commit: is the plan still as good and as fast?

Plans come from `tune`, which measures and proves them; nothing here measures a candidate.
"""
