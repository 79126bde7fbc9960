"""A whole chain as one compiled step over packed leaves. All that compiles a chain is here.

The way of a call, downwards: `step` and `value_and_grad` read trees, `planned` compares them with the last ones or
checks them and finds their plan, and `plan` runs kernels on the memory of `memory`. A plan is made of a record of the
chain (`recording`), cut into groups of leaves that are treated alike (`grouping`), which become graphs (`lowering`).

`fusing` is the public call, `donation` says what a step may write into, `shards` is a step on the shards of this
process, and `freshness` notices gradients that nothing was written into. What torch does not document is in
`core.undocumented`.
"""
