# How python -m quill.scaling trains its models, whose sizes, rates and steps it gives itself.
# One pass over the text or less, so there is nothing to hold back.

eval_interval = 10**9  # at the start and at the end
eval_iters = 50
log_interval = 1000

gradient_accumulation_steps = 1
dropout = 0.0
qk_norm = True
init_std = 0.08  # about 1 / sqrt(n_embd) of those in the middle

optimizer = "muon"
muon_momentum = 0.9
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 50
beta2 = 0.99

device = "cpu"  # one thread each
