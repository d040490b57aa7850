# A character-level model of Shakespeare, 10.65 M parameters: for a GPU.
# Lowest val loss 1.440 (3 seeds), 52 s of an H200 in all. What the switches are worth in the
# small model, on a CPU, is in docs/results.md.

dataset = "shakespeare_char"
eval_interval = 250  # often, because it will overfit: best.pt keeps the lowest val loss
eval_iters = 200  # 51,200 tokens for the train loss
log_interval = 10  # reading a loss makes the GPU wait: not at every step

batch_size = 64  # 16,384 tokens a step, which keep a GPU busy
gradient_accumulation_steps = 1  # the batch fits
block_size = 256  # a few speeches of context

n_layer = 6  # with the next two, nanoGPT's size, so that the results compare
n_head = 6  # heads of 64 channels, which attention kernels like
n_embd = 384
dropout = 0.2  # 61 steps are one pass over the text: it needs holding back
position = "rotary"  # in the small model 0.08 better than a table of learned positions
qk_norm = True  # worth little here, but keeps attention even-tempered at high rates
mlp = "swiglu"  # there 0.02 better than GELU
init_std = 0.05  # about 1 / sqrt(n_embd)

learning_rate = 1e-3  # a small model takes a high one
min_lr = 0.0  # the last steps gain from ever smaller updates
lr_schedule = "linear"
warmup_iters = 100  # Adam's averages need some steps before they can be trusted
max_iters = 3000  # nanoGPT's recipe is past its lowest val loss well before its 5,000
beta2 = 0.99  # few tokens in a step: average their squares for longer
average_decay = 0.995  # on little text the best regulariser of all (docs/results.md)
