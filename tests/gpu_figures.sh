#!/usr/bin/env bash
# Measures on a GPU what docs/results.md still lacks, after running the CUDA tests. Needs the two
# Shakespeare datasets prepared. The path of a nanoGPT checkout with its own data prepared adds the
# comparison.
#
#     tests/gpu_figures.sh RESULT_FOLDER [NANOGPT_FOLDER]
set -u
results=$(mkdir -p "$1" && cd "$1" && pwd)
nanogpt=${2:-}
cd "$(dirname "$0")/.."

step() { # step NAME COMMAND...: run it, keep its output, show its last line and its time
    local name=$1 started=$SECONDS
    shift
    "$@" > "$results/$name.txt" 2>&1
    echo "$name: exit $?, $((SECONDS - started)) s: $(tail -n 1 "$results/$name.txt")"
}

step cuda_tests python -m pytest -m cuda -q

for mode in default reduce-overhead; do
    for config in shakespeare_char speedrun; do
        step "bench_${config}_$mode" python -m quill.bench "config/$config.py" \
            --compile_mode=$mode --json="$results/bench_${config}_$mode.json"
    done
done
step bench_shakespeare_char_deterministic python -m quill.bench config/shakespeare_char.py \
    --deterministic=true --json="$results/bench_shakespeare_char_deterministic.json"
step bench_gpt2_124M python -m quill.bench config/shakespeare.py --n_layer=12 --n_head=12 --n_embd=768 \
    --block_size=1024 --batch_size=32 --dropout=0 --timed_steps=50 \
    --json="$results/bench_gpt2_124M.json"
step bench_gpt2_124M_classic python -m quill.bench config/gpt2.py --dataset=shakespeare --batch_size=32 \
    --gradient_accumulation_steps=1 --timed_steps=50 --json="$results/bench_gpt2_124M_classic.json"
step plan_gpt2_124M python -m quill.bench config/shakespeare.py --n_layer=12 --n_head=12 --n_embd=768 \
    --block_size=1024 --batch_size=32 --dropout=0 --plan --json="$results/plan_gpt2_124M.json"

for config in speedrun shakespeare_char lecture; do
    for seed in 1337 1338 1339; do
        step "train_${config}_$seed" python train.py "config/$config.py" --seed=$seed \
            --out_dir="$results/out_${config}_$seed"
    done
done

# Pretrain and finetune, if a larger text and Shakespeare are prepared by byte (docs/lecture.md).
if [ -d data/classics ] && [ -d data/shakespeare_byte ]; then
    step pretrain python train.py config/speedrun.py --dataset=classics --max_iters=6000 \
        --dropout=0 --average_decay=0 --eval_interval=1000 --out_dir="$results/out_classics"
    for seed in 1337 1338 1339; do
        step "finetune_$seed" python train.py config/speedrun.py --dataset=shakespeare_byte \
            --init_from="$results/out_classics" --seed=$seed --max_iters=500 \
            --muon_learning_rate=0.00375 --learning_rate=0.0005 --out_dir="$results/out_tuned_$seed"
    done
fi

if [ -n "$nanogpt" ]; then
    cd "$nanogpt"
    step nanogpt_train python train.py config/train_shakespeare_char.py
    step nanogpt_sample python sample.py --out_dir=out-shakespeare-char --num_samples=1
fi
