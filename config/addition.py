# Sums of numbers of up to three digits, learned from examples: `python prepare.py addition` first.
# Two to three minutes on a CPU. Only answers carry loss, and are written from the last digit on.

dataset = "addition"
eval_interval = 1000  # all 10,000 problems that were held out
eval_iters = 2000  # windows for the train loss
log_interval = 100

batch_size = 512  # problems: a window holds one, or two short ones
gradient_accumulation_steps = 1
block_size = 12  # the longest problem, 999+999=8991 and its end, less the token never predicted

n_layer = 2  # one to find the digits that belong together, one to add them and the carry
n_head = 4
n_embd = 64
dropout = 0.0  # nothing is seen often
position = "rotary"
qk_norm = True
mlp = "swiglu"
init_std = 0.12  # about 1 / sqrt(n_embd)

learning_rate = 4e-3  # a small model takes a high one
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 50
max_iters = 4000  # each problem is seen twice

device = "cpu"  # at this size a GPU would mostly wait for its next command
