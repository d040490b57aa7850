# The 10.65 M model of Shakespeare by the fastest way known to us, for a GPU: Muon for the blocks'
# matrices. Lowest val loss 1.359 (3 seeds), 35 s of an H200 in all. Chosen by runs on
# a CPU (docs/results.md).

dataset = "shakespeare_char"
eval_interval = 100  # often, because it will overfit: best.pt keeps the lowest val loss
eval_iters = 50  # 12,800 tokens for the train loss
log_interval = 20  # reading a loss makes the GPU wait: not at every step

batch_size = 64  # 16,384 tokens a step, which keep a GPU busy
gradient_accumulation_steps = 1  # the batch fits
block_size = 256  # a few speeches of context

n_layer = 6  # with the next two, nanoGPT's size, so that the results compare
n_head = 6  # heads of 64 channels, which attention kernels like
n_embd = 384
dropout = 0.0  # strong weight decay holds back better, on a CPU at least
position = "rotary"
qk_norm = True
mlp = "swiglu"
token_shift = True  # the MLP also reads the token before
init_std = 0.05  # about 1 / sqrt(n_embd)

optimizer = "muon"
muon_learning_rate = 0.015
muon_momentum = 0.9  # a short memory suits a short run
learning_rate = 2e-3  # of the embedding and the gains, which AdamW trains
min_lr = 0.0  # the last steps gain from ever smaller updates
lr_schedule = "linear"
warmup_iters = 50
max_iters = 1000  # 16 passes over the text
compile_mode = "blocks"  # to compile all of the model at once takes longer than to train it
beta2 = 0.99  # few tokens in a step: average their squares for longer
weight_decay = 1.0  # 61 steps are one pass over the text: it needs holding back
average_decay = 0.995  # evaluate, and keep in best.pt, the mean of the last 200 steps or so
