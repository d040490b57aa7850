# Reinforcement learning from a reward model: python -m quill.rl, from a model of Shakespeare whose
# context is 128, with the judge of config/verse.py, whose taste the reward model has learned.
# A few minutes on a CPU; docs/lecture.md has the commands before it.

reward = "out-reward"  # a run of quill.reward
judge = "config/verse.py"  # what evaluations say beside it
eval_interval = 20
log_interval = 5
val_prompts = 300

prompts_per_step = 16
completions = 8
max_new_tokens = 112  # about three lines; with the prompt's 16, a whole context
updates = 2

kl_weight = 0.3  # with 0 it finds what the reward model is wrong about
learning_rate = 3e-4
max_iters = 60

device = "cpu"  # at this size a GPU would mostly wait for its next command
