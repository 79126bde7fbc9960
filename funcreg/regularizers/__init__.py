"""Penalties and constraints: the mathematics, one block each.

`penalty` says what a penalty is, `lifting` makes one of rules on a leaf, `constraint` one of a projection. The plain
ones are in `penalties` and `constraints`; the other modules each hold a family of them.
"""
