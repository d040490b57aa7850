# Shakespeare in GPT-2's tokens, from scratch: for a GPU.

dataset = "shakespeare"
eval_interval = 100  # 302 thousand tokens are little for this vocabulary: it overfits early
eval_iters = 100
log_interval = 10

batch_size = 32
gradient_accumulation_steps = 1
block_size = 256

n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.4  # 27 passes over a small text
position = "rotary"  # this and the next two were each better in the small model (RESULTS.md)
qk_norm = True
mlp = "relu2"
tied_head = True  # a second 50,257 x 256 matrix would learn little from this text
vocab_multiple = 64  # 50,304 rows: matrix units like round numbers

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 1000
beta2 = 0.99  # few tokens in a step: average their squares for longer
weight_decay = 0.1
