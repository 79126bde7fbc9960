"""What all else stands on: trees, masks, functions over leaves, checks, and the words of errors.

`tree` alone knows optree, `undocumented` alone what torch does not document. `leafwise` computes over leaves in the
precision that they need, `masks` and `selection` choose some of them, `sharding` and `locality` let a rule on one leaf
run on the shards of it.
"""
