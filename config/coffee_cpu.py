# The best model of Shakespeare that two CPU cores can train while you fetch a coffee: ten minutes.
# What each choice is worth is measured in docs/results.md.

dataset = "shakespeare_char"
eval_interval = 490  # an evaluation costs as much as 20 steps, and a run saves at evaluations
eval_iters = 40  # 10,240 tokens for the train loss
log_interval = 25  # a line every ten seconds

batch_size = 12  # with the next, 3,072 tokens a step: large matrix products, and Muon's cost shared
block_size = 256  # with 128, a step takes a sixth less time, but learns less
gradient_accumulation_steps = 1  # the batch fits

n_layer = 5  # with the next two: 2.2 million parameters; 6 make fewer steps and are no better
n_head = 6  # heads of 32 channels
n_embd = 192
dropout = 0.0  # its kernels are slow on a CPU; weight decay and averaging hold back instead
position = "rotary"
qk_norm = True
mlp = "swiglu"
token_shift = True  # as good as two thirds more steps
init_std = 0.07  # about 1 / sqrt(n_embd)

optimizer = "muon"
muon_learning_rate = 0.015
muon_momentum = 0.9
learning_rate = 4e-3  # of the embedding and the gains, which AdamW trains
weight_decay = 0.3  # four and a half passes over the text; 0.5 is too much
average_decay = 0.995  # evaluate, and keep in best.pt, the mean of the last 200 steps or so
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 50
max_iters = 1470
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"  # on a GPU take config/speedrun.py
