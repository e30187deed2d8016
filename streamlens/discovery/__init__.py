"""One watched forward pass -> the anatomy of a model.

watch       what happened: every operation, its tensors, the module and the call that ran it
graph       which tensors everything must pass through (the cuts)
chain       which of the diamonds between cuts are residual additions
branches    what a branch is: attention, cross-attention, mixer, MLP; where its norms stand
naming      which block a sublayer belongs to, and its label
embedding   the parts of x_0          norms   the norms on the stream       head   what follows the last state
recording   the steps as instructions that can be replayed
bypass      which modules a run from a later state can leave out
layout      which axis counts positions
streams     all of it together: `discover`
"""
