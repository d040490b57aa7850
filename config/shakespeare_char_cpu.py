# A small character-level model of Shakespeare for a machine without a GPU: about a minute.
# Where a line gives a difference in val loss, RESULTS.md has the runs.

dataset = "shakespeare_char"
eval_interval = 500  # an evaluation covers the whole val split and costs as much as 40 steps
eval_iters = 200
log_interval = 100

batch_size = 12
gradient_accumulation_steps = 1  # 768 tokens a step: many cheap updates beat few dear ones
block_size = 64  # a line or two: what a model of this size can make use of

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # it sees the text just once: nothing to hold back
position = "rotary"  # 0.15 better than a table of learned positions
qk_norm = True  # 0.05 better
mlp = "relu2"  # 0.13 better than GELU

learning_rate = 1e-3  # a small model takes a high one
min_lr = 1e-4  # a tenth of the highest
warmup_iters = 100
max_iters = 1500
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"
