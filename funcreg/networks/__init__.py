"""From L1 to a smaller network: groups that span leaves, found by following channels, and taken out once they are dead.

`families` and `coupled` are groups and their penalty. `tracing` runs a network, `flow` follows channels through it by
the rules in `shapes`, `products`, `layers`, `recurrent` and `rows`, `channels` makes families of them, and `trying`
takes some out to see that outputs stay what they are. `removal` and `resizing` make the smaller network.
"""
