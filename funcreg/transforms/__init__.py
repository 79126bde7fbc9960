"""Gradient transforms under optax's names: chains, wrappers, schedules, optimizers, and penalties in them.

`transform` says what one is, `chains` and `combine` make one of several. `regularizing` and `proximal` are where
penalties meet them; `mistakes` knows what is seldom meant.
"""
