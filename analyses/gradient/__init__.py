"""What of the gradient came over the skip, and what through the branch.

graph       one forward pass with its graph kept, and the pieces of it      answer      the results' figures and tables
sequences   numbers of each sequence, and means with intervals              door        `gradient_flow`
paths       `path_spectrum`
"""
