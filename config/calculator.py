# A calculator of numbers of up to eight digits, with scratch work: `python prepare.py calculator`
# first. Half an hour on a CPU; `python -m quill.arithmetic --out_dir=...` shows what it has right.

dataset = "calculator"
eval_interval = 1000  # all problems that were held out
eval_iters = 200  # windows for the train loss
log_interval = 100

batch_size = 24  # windows of one long or several short problems
gradient_accumulation_steps = 1
block_size = 320  # the longest, 10000000/1000= with its work and its end, is 320 tokens

n_layer = 3
n_head = 4
n_embd = 128
dropout = 0.0  # all but small numbers are seen once or twice
position = "rotary"
qk_norm = True
mlp = "swiglu"
init_std = 0.09  # about 1 / sqrt(n_embd)

optimizer = "muon"
muon_learning_rate = 0.015
muon_momentum = 0.9
learning_rate = 4e-3  # of the embedding and the gains, which AdamW trains
beta2 = 0.99
min_lr = 0.0  # the last 15 % come when the steps are small
lr_schedule = "linear"
warmup_iters = 50
max_iters = 8000

device = "cpu"  # at this size a GPU would mostly wait for its next command
