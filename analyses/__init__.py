"""Questions asked of a residual stream, one file per question.

source       where the blocks come from: a file or a live model, the same to every analysis
result       what every answer can do: to_frame, plot, save, show itself in a notebook
statistics   sums, quantiles and intervals that stream and merge          figures   one look for all plots
frozen       norms as linear maps, their statistics held fixed
transport    what has become of each part and write by the time it stands in a later state

position     how much of each state is position, and which of its terms brought it
  _sums        what is added up          _geometry    subspaces, kernels, ranks          _figures
  _probes      can a linear map tell?    _sample      a bounded sample of tokens, ridge regression
  _lesion      does the skip carry it?   _theatre     runs in which a skip is damaged
"""
