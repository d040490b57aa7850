# A calculator of numbers of up to three digits, with scratch work: `python prepare.py calculator`
# first. About seven minutes on a CPU; `python arithmetic.py --out_dir=...` shows what it has right.

dataset = "calculator"
eval_interval = 1000  # all problems that were held out
eval_iters = 1000  # windows for the train loss
log_interval = 100

batch_size = 96  # windows of one long or several short problems
gradient_accumulation_steps = 1
block_size = 64  # the longest problem is 62 tokens

n_layer = 3
n_head = 4
n_embd = 96
dropout = 0.0  # hardly anything is seen twice
position = "rotary"
qk_norm = True
mlp = "swiglu"
init_std = 0.1  # about 1 / sqrt(n_embd)

learning_rate = 3e-3  # a small model takes a high one
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 50
max_iters = 5000

device = "cpu"  # at this size a GPU would mostly wait for its next command
