# The calculator of config/calculator.py, stopped early, learns on from rewards alone: python -m
# quill.rl. It needs a start that is sometimes right; docs/results.md shows what that start lacks.

reward = "answers"  # 1 for the right answer, whatever the scratch work
eval_interval = 30  # a problem has up to 320 tokens, and all that were held out take a minute
log_interval = 10
val_prompts = 400
batch_size = 64  # windows of about one length, read at a time

prompts_per_step = 128
completions = 8
max_new_tokens = 300
baseline = "optimal"  # a wrong answer pulls harder at the weights than a right one, and says less

optimizer = "muon"
muon_learning_rate = 0.0025  # at 0.005 it leaves out scratch work, and has fewer right
muon_momentum = 0.9
learning_rate = 5e-4  # of the embedding and the gains, which AdamW trains
beta2 = 0.99
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 5
max_iters = 120

device = "cpu"  # at this size a GPU would mostly wait for its next command
