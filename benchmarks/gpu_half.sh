#!/bin/sh
# The GPU half of the tests, then the speed table, on one GPU:
#   sh benchmarks/gpu_half.sh TOKENIZER DATA OUT
# The parts of the tests train tiny models side by side; the speed table has the GPU to itself.
set -u
tokenizer=$1 data=$2 out=$3
half() {
    timeout "${TEST_SECONDS:-390}" python3 -m pytest tests/gpu -s --tb=short -p no:cacheprovider \
        --basetemp "/tmp/gpu-$1" -k "$2" >"$out/gpu-$1.log" 2>&1
    echo "$1: exit $?"
}
half plain "fused-norm" &
half scales "loop-scales" &
half corrections "corrections" &
half unrolled "unrolled" &
wait
grep -hE " against |: decoder|passed|failed|^E   [A-Z]" "$out"/gpu-*.log | cut -c1-160 | sort -u
timeout "${SPEED_SECONDS:-190}" python3 benchmarks/train_speed.py --tokenizer "$tokenizer" --data "$data" \
    --output "$out/train-speed.md" --steps 15
