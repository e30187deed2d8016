"""Questions asked of a residual stream, one package per question, and what they share.

norms        how large each write is, where it points, what share of the last state it is
lens         what the model would say if it stopped at each state
ablation     what the model loses without a layer or a sublayer
position     how much of each state is position, and which of its terms brought it
gradient     what of the gradient came over the skip, and what through the branch

source       where the blocks come from: a file or a live model, the same to every analysis
result       what every answer can do: to_frame, plot, save, show itself in a notebook
statistics   sums, quantiles and intervals that stream and merge          figures      one look for all plots
frozen       norms as linear maps, their statistics held fixed            unembedding  from the last state to the logits
transport    what has become of each part and write by the time it stands in a later state
heads        the writes of single attention heads
"""
