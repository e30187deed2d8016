"""What of a stream is position, where it comes from, and whether the skip is what keeps it.

sums        the mean decomposition, folded block by block         geometry    subspaces, kernels, ranks
door        `positional_persistence`                              drawing     figures
sample      the same tokens in every run                          probes      `position_probes`
theatre     runs in which a skip is damaged                       lesion      `position_lesion`
"""
