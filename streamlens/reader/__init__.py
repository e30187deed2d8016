"""The capture file, from the reading side: lazy, memory-mapped, proved again on demand.

opening     `open_capture` and `Capture`    mapped     datasets as mapped tensors
stream      one stream by name or by block  page       how a notebook shows a capture
labelled    xarray                          health     NaN and massive activations
verifying   `verify`: hashes and proof once more
"""
