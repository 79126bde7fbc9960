"""A whole chain as one compiled step over packed leaves. All that compiles a chain is here.

The way of a call, downwards: `step` checks it and finds its plan, `plan` runs kernels on the memory of `memory`. A plan
is made of a record of the chain (`recording`), cut into groups of leaves that are treated alike (`grouping`), which
become graphs (`lowering`). `fusing` is the public call, `shards` a step on the shards of this process, `freshness`
notices gradients that nothing was written into. What torch does not document is in `core.undocumented`.
"""
