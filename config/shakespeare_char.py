# A character-level model of Shakespeare, 10.7 M parameters: for a GPU.

dataset = "shakespeare_char"
eval_interval = 250  # often, because it will overfit: best.pt keeps the lowest val loss
eval_iters = 200
log_interval = 10

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256  # a few speeches of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 16,384 tokens a step pass over the text every 61 steps: it needs holding back
position = "rotary"  # this and the next two were each better in the small model (RESULTS.md)
qk_norm = True
mlp = "relu2"

learning_rate = 1e-3  # a small model takes a high one
min_lr = 1e-4  # a tenth of the highest
warmup_iters = 100
max_iters = 3000  # nanoGPT's recipe is past its lowest val loss well before its 5,000
beta2 = 0.99  # few tokens in a step: average their squares for longer
