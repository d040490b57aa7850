# Reinforcement learning with a reward that can be checked: python -m quill.rl, from a model that
# adds badly. Five minutes on a CPU; docs/lecture.md says how to make such a model.

reward = "answers"  # 1 for the right sum, 0 for any other
eval_interval = 100  # all 10,000 problems that were held out
log_interval = 20

prompts_per_step = 128
completions = 8
screened = 8  # of 1,024 prompts, those that a first try got wrong
baseline = "optimal"  # a wrong answer pulls harder at the weights than a right one, and says less

optimizer = "muon"  # learns in a third of AdamW's steps
muon_learning_rate = 0.01
muon_momentum = 0.9
learning_rate = 1.5e-3  # of the embedding and the gains, which AdamW trains
beta2 = 0.99
min_lr = 0.0
lr_schedule = "linear"
warmup_iters = 20
max_iters = 1150

device = "cpu"  # at this size a GPU would mostly wait for its next command
