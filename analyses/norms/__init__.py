"""Contribution norms: how large each write is, where it points, and what share of the last state it is.

measures     what is measured, token by token        accumulate   folding blocks in
states       the size of the states along depth      cosines      the direction of each write against every other
answer       the result and its figures              door         `contribution_norms`
"""
