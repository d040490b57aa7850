# GPT-2 124M from scratch, on a corpus of your own in GPT-2's tokens: for GPUs. Its loss is not
# measured yet; its speed and memory are (docs/results.md).
#     python prepare.py corpus --input=FOLDER --tokenizer=gpt2
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

dataset = "corpus"
eval_interval = 250
eval_iters = 1000  # a million tokens of each split, spread evenly
log_interval = 10  # reading a loss makes the GPU wait: not at every step

batch_size = 12  # takes 7 GB as planned, 8 without torch.compile, 28 for 64 (docs/results.md)
block_size = 1024
gradient_accumulation_steps = 40  # 491,520 tokens a step, shared out among the processes

n_layer = 12
n_head = 12
n_embd = 768
bias = False  # as good without, and a little faster
vocab_multiple = 128  # 50,304 rows: matrix units like round numbers

learning_rate = 6e-4  # of the GPT-3 paper, for this size (Brown et al. 2020, table 2.1)
min_lr = 6e-5
warmup_iters = 700
max_iters = 20000  # 10 billion tokens
weight_decay = 0.1
beta2 = 0.95
