# GPT-2, finetuned on Shakespeare: for a GPU. Its weights are downloaded once (0.5 GB).
# Not measured yet. `--init_from=gpt2-medium`, -large or -xl take a larger one.

init_from = "gpt2"  # n_layer, n_head, n_embd and all else that the weights decide come from them
dataset = "shakespeare"  # in GPT-2's own tokens
eval_interval = 5  # it overfits within a few passes: best.pt keeps the lowest val loss
eval_iters = 40  # windows for the train loss
log_interval = 1
always_save_checkpoint = False  # a checkpoint holds three times the weights

batch_size = 4  # windows of 1,024 tokens
gradient_accumulation_steps = 8  # 32,768 tokens a step: 9 steps are one pass over the text
max_iters = 40

dropout = 0.1  # as GPT-2 was trained, and four passes over a small text
learning_rate = 3e-5  # low: the weights are good already
lr_schedule = "constant"
warmup_iters = 0
