"""A model that is sharded over ranks is measured by all of them, and decided on by one.

Every forward has collectives. Ranks that searched by their own clocks would sooner or later run different forwards, and
wait for each other for good. So the first rank searches (`Leader`), as if it were alone, and the others run what it
runs, when it does (`follow`). Only its measurements and its clock decide.
"""
