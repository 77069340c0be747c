"""The loops over coordinates: `native` in numba, and `reference` in torch fp64 that says what they must return.

What goes here: leaves that see windows of plain arrays. What does not: rows of peers, weights' meaning, threads.
Import `native` where it is used, not at the top of a module: it imports numba.
"""
