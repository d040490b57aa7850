# A small character-level model of Shakespeare for a machine without a GPU: about a minute.
# The differences in val loss are those of RESULTS.md, each from one run.

dataset = "shakespeare_char"
eval_interval = 500  # an evaluation covers the whole val split and costs as much as 40 steps
eval_iters = 200  # 12,800 tokens for the train loss
log_interval = 100  # a line every three seconds or so

batch_size = 12  # 768 tokens a step: many cheap updates beat few dear ones
gradient_accumulation_steps = 1  # the batch fits
block_size = 64  # a line or two: what a model of this size can make use of

n_layer = 4  # with the next two: 0.8 million parameters, a minute's worth
n_head = 4  # heads of 32 channels
n_embd = 128
dropout = 0.0  # it passes over the text about once: nothing to hold back
position = "rotary"  # 0.15 better than a table of learned positions
qk_norm = True  # 0.05 better
mlp = "relu2"  # 0.13 better than GELU

learning_rate = 1e-3  # 2e-3 was no better
min_lr = 1e-4  # a tenth of the highest
warmup_iters = 100  # Adam's averages need some steps before they can be trusted
max_iters = 1500  # 2,000 would still gain a few hundredths
beta2 = 0.99  # few tokens in a step: average their squares for longer

device = "cpu"  # at this size a GPU would mostly wait for its next command
