# Behind config/speedrun_cpu.py: the shortest time to the val loss of nanoGPT's CPU recipe, 1.8857.

eval_interval = 10000  # at the first step and the last alone
eval_iters = 20  # 1,920 windows of 64 tokens say enough about the train loss
log_interval = 50

batch_size = 24  # larger matrix products use the machine better than more steps
n_layer = 2  # in so few steps two layers learn more than four, and each step takes half the time
n_head = 2

muon_learning_rate = 0.03  # the fewer the steps, the longer each
learning_rate = 6e-3
warmup_iters = 20
max_iters = 210
