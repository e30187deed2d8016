"""Every state of a stream through the model's own head.

head        the head as a function of one state, taken apart      trace       how it is found, on a few tokens
metrics     two distributions compared in few passes              tally       sums of a block, means with intervals
door        `logit_lens`        writes    `write_lens`, what each write adds to the logits
grid        the likeliest tokens, state by state                  drawing     figures
tuned       `train_lens`, a translator for each state             moments  closed forms    descent  by gradient
"""
