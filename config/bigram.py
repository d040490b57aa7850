# The lecture's baseline: which character follows which, and nothing else. Seconds on a CPU.
# Counting the pairs of the train split gives the lowest loss that such a table can have there.

dataset = "shakespeare_char"
model = "bigram"
eval_interval = 100
log_interval = 100

batch_size = 64  # 16,384 pairs a step
gradient_accumulation_steps = 1
block_size = 256  # only cuts the text: a bigram sees one character

learning_rate = 0.03  # each score is a parameter of its own: it may run
min_lr = 0.0
lr_schedule = "linear"  # to settle
warmup_iters = 0
max_iters = 600
weight_decay = 0.05  # keeps pairs that were never seen from becoming impossible

device = "cpu"  # a table look-up
