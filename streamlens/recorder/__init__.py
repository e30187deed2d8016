"""A capture, from the model to the file.

feed        which inputs are run                pilot      try the model on a few tokens before anything is written
plan        what will be stored, to the byte    blocks     run, record, prove and commit, block by block
capturing   the door: `capture`
"""
