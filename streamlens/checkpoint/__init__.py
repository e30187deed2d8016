"""A file, a folder, a factory or a live module -> a `Model`, without running anything that a file says.

sniff       what a file is, by its first bytes      pickles      reading torch files without running them
weights     state dicts and their wrappers          hf_config    distrust of configs
pretrained  Hugging Face folders and GGUF           nanogpt      the model class of nanoGPT checkpoints
tokenizers  text to ids                             limits       vocabulary and positions
packing     one self-contained model.pt             model        what loading gives
loading     the door: `load`
"""
