"""Questions asked of a residual stream, one file per question.

source       where the blocks come from: a file or a live model, the same to every analysis
result       what every answer can do: to_frame, plot, save, show itself in a notebook
statistics   sums, quantiles and intervals that stream and merge          figures   one look for all plots
frozen       norms as linear maps, their statistics held fixed
"""
