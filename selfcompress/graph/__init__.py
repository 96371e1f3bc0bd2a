"""Find out which channels of a model are tied together, which are dead and which can be removed.

The modules, in the order in which they are best read:

    observe                       run the model once and record what is called, and how
    trace, tracer                 trace it with torch.fx, in parts if it cannot be traced whole
    widths_read, other_sizes      detect code that depends on layer widths or on input sizes
    ops, products                 what each operation does to channels
    ids, channels                 the data structures: channel ids and the channel graph
    in_place, follow              build the channel graph from the trace
    liveness, connection          which rows and channels are alive, and which have to be
    removable, fast_widths        which dead channels can be removed, and which are better kept
    planner                       turn all that into the indices that a cut keeps
"""
