"""KV caches: slots that are allocated once (`slots`), lent one generation each (`pool`); narrow numbers (`narrow`).

`slot_forward` computes the model over slots.
"""
