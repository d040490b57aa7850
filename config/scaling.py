# How python -m quill.scaling trains its models; what differs by size or budget it gives itself.
# Hardly any run passes over the text more than once, so there is nothing to hold back.

eval_interval = 10**9  # at the start and at the end
eval_iters = 2048  # windows, 131,072 tokens, of a val split that is too large to be evaluated whole
log_interval = 1000

gradient_accumulation_steps = 1
dropout = 0.0
qk_norm = True

optimizer = "muon"
muon_momentum = 0.9
min_lr = 0.0
lr_schedule = "linear"
beta2 = 0.99

device = "cpu"  # one thread each
