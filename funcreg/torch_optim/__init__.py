"""Torch's optimizers: `regularize` puts a penalty on one of them, `Optimizer` makes one of a chain.

`denominators` reads the step and the metric out of an optimizer, `followed_steps` and `landing` apply the proximal
operator after it. `group_values` and `optimizer_state` are what `Optimizer` shows of a chain to torch.
"""
