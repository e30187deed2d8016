"""What a model loses when some of its layers or sublayers are left out.

spans        what is dropped, and how
runs         one block run again without it, from the stored state before it
scores       what the change does to the output: paired, with intervals
sweep        every layer and sublayer by itself; the cheap proxies beside it        proxies      from states alone
blocks       contiguous blocks, start by length        pairs        two at a time, and their interaction
orders       neighbours swapped        greedy       one after the other, against other orders
repair       direct, indirect and norm effect, which add up
"""
