# A small character-level model of Shakespeare for a machine without a GPU: about a minute.

dataset = "shakespeare_char"
eval_interval = 500  # an evaluation of the whole val split costs as much as 40 steps
eval_iters = 200
log_interval = 100

batch_size = 12
gradient_accumulation_steps = 1  # 768 tokens a step: many cheap updates beat few dear ones
block_size = 64  # most of what a small model can use is in the last few words

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # too small to overfit in one and a half passes over the text
position = "rotary"  # no position table to learn, and a better model
qk_norm = True  # keeps attention calm at a high learning rate
mlp = "relu2"  # as good as GELU, and cheaper
tied_head = False  # 65 rows are no burden; starting at zero helps
residual_init = "zero"  # every block begins as the identity

learning_rate = 1e-3  # a small model takes a high one
min_lr = 1e-4
warmup_iters = 100
max_iters = 1500
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"
