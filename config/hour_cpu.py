# The best model of Shakespeare that two CPU cores can train in an hour.
# What each choice is worth is measured in docs/results.md.

dataset = "shakespeare_char"
eval_interval = 575  # an evaluation costs as much as 20 steps, and a run saves at evaluations
eval_iters = 40  # 10,240 tokens for the train loss
log_interval = 50  # a line every half minute or so

batch_size = 12  # with the next, 3,072 tokens a step
block_size = 256  # a few speeches of context
gradient_accumulation_steps = 1  # the batch fits

n_layer = 6  # with the next two: 4.8 million parameters
n_head = 8  # heads of 32 channels
n_embd = 256
dropout = 0.0  # its kernels are slow on a CPU; weight decay and averaging hold back instead
position = "rotary"
qk_norm = True
mlp = "swiglu"
token_shift = True
init_std = 0.0625  # 1 / sqrt(n_embd)

optimizer = "muon"
muon_learning_rate = 0.015
muon_momentum = 0.9
learning_rate = 4e-3  # of the embedding and the gains, which AdamW trains
weight_decay = 0.7  # 14 passes over the text, by five parameters for each of its characters
average_decay = 0.998  # evaluate, and keep in best.pt, the mean of the last 500 steps or so
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 50
max_iters = 4600
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"  # --device=cuda takes two minutes of an H200, to the same loss
