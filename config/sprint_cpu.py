# Behind config/speedrun_cpu.py: the shortest time to the val loss of nanoGPT's CPU recipe, 1.8857.

eval_interval = 10000  # at the first step and the last alone
eval_iters = 20  # 1,280 tokens for the train loss
log_interval = 50

batch_size = 24  # larger matrix products use the machine better than more steps
n_layer = 2  # in so short a time, many steps of a small model beat few of a large one
n_head = 2

muon_learning_rate = 0.03  # the fewer the steps, the longer each
muon_momentum = 0.8  # and the shorter the memory
learning_rate = 1.5e-2
lr_schedule = "wsd"
wsd_decay_share = 0.6
warmup_iters = 10
max_iters = 140
