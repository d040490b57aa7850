# A small character-level model of Shakespeare for a machine without a GPU: under a minute.
# What each choice is worth is measured in docs/results.md.

dataset = "shakespeare_char"
eval_interval = 500  # an evaluation covers the whole val split and costs as much as 50 steps
eval_iters = 200  # 12,800 tokens for the train loss
log_interval = 100  # a line every two seconds or so

batch_size = 12  # 768 tokens a step: many cheap updates beat few dear ones
gradient_accumulation_steps = 1  # the batch fits
block_size = 64  # a line or two: what a model of this size can make use of

n_layer = 4  # with the next two: 0.8 million parameters, a minute's worth
n_head = 4  # heads of 32 channels
n_embd = 128
dropout = 0.0  # it passes over the text once and a half: nothing to hold back
position = "rotary"  # 0.08 better than a table of learned positions
qk_norm = True  # worth little here, but keeps attention even-tempered at high rates
mlp = "swiglu"  # 0.02 better than GELU
init_std = 0.08  # about 1 / sqrt(n_embd); 0.04 better than GPT-2's 0.02, made for a wide model

learning_rate = 2e-3  # a small model takes a high one
min_lr = 0.0  # the last steps gain from ever smaller updates
lr_schedule = "linear"
warmup_iters = 100  # Adam's averages need some steps before they can be trusted
max_iters = 2000
beta1 = 0.8  # short memories suit a short run
beta2 = 0.95

device = "cpu"  # at this size a GPU would mostly wait for its next command
