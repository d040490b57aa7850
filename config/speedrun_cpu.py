# The small model of Shakespeare by the fastest way known to us: Muon for the blocks' matrices.
# Followed by config/sprint_cpu.py, it is as good as nanoGPT's CPU recipe in seconds.

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
token_shift = True  # 0.015 better: the MLP also reads the token before
init_std = 0.08  # about 1 / sqrt(n_embd); 0.04 better than GPT-2's 0.02, made for a wide model

optimizer = "muon"
muon_learning_rate = 0.015  # 0.01 does as well
muon_momentum = 0.9  # a short memory suits a short run
learning_rate = 4e-3  # of the embedding and the gains, which AdamW trains
min_lr = 0.0  # the last steps gain from ever smaller updates
lr_schedule = "linear"
warmup_iters = 50
max_iters = 2000
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"  # at this size a GPU would mostly wait for its next command
