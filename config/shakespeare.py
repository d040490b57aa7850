# Shakespeare in GPT-2's tokens, from scratch, 16 M parameters: for a GPU.

dataset = "shakespeare"
eval_interval = 100  # 302 thousand tokens are little for this vocabulary: it overfits early
eval_iters = 100  # 25,600 tokens for the train loss
log_interval = 10  # reading a loss makes the GPU wait: not at every step

batch_size = 32  # 8,192 tokens a step; takes 1.4 GB, 0.8 of it for their 50,304 scores each
gradient_accumulation_steps = 1  # the batch fits
block_size = 256  # about a page

n_layer = 4  # with the next two, small: most of the parameters are the embedding's anyway
n_head = 4  # heads of 64 channels, which attention kernels like
n_embd = 256
dropout = 0.4  # 27 passes over a small text
position = "rotary"  # in the small model 0.08 better than learned positions (docs/results.md)
qk_norm = True  # worth little here, but keeps attention even-tempered at high rates
mlp = "swiglu"  # there 0.02 better than GELU
tied_head = True  # a second 50,257 x 256 matrix would learn little from this text
vocab_multiple = 64  # 50,304 rows: matrix units like round numbers

learning_rate = 1e-3  # a small model takes a high one
min_lr = 1e-4  # a tenth of the highest
warmup_iters = 100  # Adam's averages need some steps before they can be trusted
max_iters = 1000  # best.pt keeps the weights from before it overfits
beta2 = 0.99  # few tokens in a step: average their squares for longer
weight_decay = 0.1  # the default, stated because it matters on a small text
