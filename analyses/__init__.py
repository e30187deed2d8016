"""Questions asked of a residual stream, one file per question.

source       where the blocks come from: a file or a live model, the same to every analysis
result       what every answer can do: to_frame, plot, save, show itself in a notebook
statistics   sums, quantiles and intervals that stream and merge          figures   one look for all plots
frozen       norms as linear maps, their statistics held fixed
transport    what has become of each part and write by the time it stands in a later state
unembed      the head as a function of one state                           head_trace   operations on single tokens

lens         what the model would say if it stopped at each state
  _tally       what is added up        _metrics    one distribution beside another, in few passes over the logits
  _grid        token by token          _writes     what each write adds to the logits         _figures
tuned_lens   the same through a learned map for each state: closed forms (tuned_moments), descent (tuned_descent)

position     how much of each state is position, and which of its terms brought it
  _sums        what is added up          _geometry    subspaces, kernels, ranks          _figures
  _probes      can a linear map tell?    _sample      a bounded sample of tokens, ridge regression
  _lesion      does the skip carry it?   _theatre     runs in which a skip is damaged
"""
