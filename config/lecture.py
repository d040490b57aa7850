# The lecture's last model, as it trains it: for a GPU. Its val loss ends near 1.48.
# Query, key and value have biases here, the head has none: 10,795,776 parameters, not 10,788,929.

dataset = "shakespeare_char"
eval_interval = 500
eval_iters = 200  # windows for the train loss; val is evaluated whole
log_interval = 100

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = True
position = "learned"
norm = "layernorm"
mlp = "relu"
tied_head = False  # its head is a matrix of its own

learning_rate = 3e-4
decay_lr = False  # constant, without warm-up
warmup_iters = 0
weight_decay = 0.01  # AdamW's default in PyTorch, as are the betas
beta2 = 0.999
grad_clip = 0.0  # no clipping
max_iters = 5000
