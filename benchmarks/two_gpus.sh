#!/bin/sh
# What a host with two GPUs can measure of this repository, in order of weight:
#   [CHERRY_SHARDS=DIR/] sh benchmarks/two_gpus.sh TOKENIZER DATA OUT [SECONDS]
# Parts of one GPU run side by side, one a GPU; those of two have the host to themselves. Each leaves OUT/NAME.md and
# OUT/NAME.log; one that has ended well leaves OUT/NAME.done too, and another start goes on behind it. After SECONDS parts
# are ended and none is begun: killed from outside, torchrun would leave its ranks on the GPUs, beside the next start's. Ranks
# that save what they have may take half a minute more. With CHERRY_SHARDS, the text of configs/experiments/moee.yaml
# (TOKENIZER then is of it), heads of experts are compared with a shared one.
set -u
tokenizer=$1 data=$2 out=$3
until=$(($(date +%s) + ${4:-86400}))
python=${PYTHON:-python3}
mkdir -p "$out/work"
part() { # NAME SECONDS PROGRAM ARGUMENTS...
    name=$1 seconds=$2 left=$((until - $(date +%s)))
    shift 2
    [ -e "$out/$name.done" ] && return
    [ "$left" -le 0 ] && return
    [ "$seconds" -gt "$left" ] && seconds=$left
    echo "$(date +%T) $name begins"
    timeout "$seconds" "$python" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] && touch "$out/$name.done"
    echo "$(date +%T) $name ends with status $status"
}
measure() { # NAME SECONDS SCRIPT ARGUMENTS...
    name=$1 seconds=$2 script=$3
    shift 3
    part "$name" "$seconds" "benchmarks/$script" --tokenizer "$tokenizer" --data "$data" --output "$out/$name.md" "$@"
}
graph="--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
# What would end every other part is seen first.
export CHERRY_TOKENIZER="$tokenizer" CHERRY_DATA="$data"
(
    export TORCH_LOGS=recompiles
    part smoke 180 -m cherry_megatron.cli pretrain --config configs/cherry_227m.yaml --set "run=$out/work/smoke" -- --train-iters 8 \
        --global-batch-size 8 --micro-batch-size 8 --lr-warmup-iters 2 --eval-iters 1 --split 98,1,1 --no-save-optim $graph
)
[ -e "$out/smoke.done" ] || exit 1
(
    export CUDA_VISIBLE_DEVICES=0
    part variants 300 benchmarks/variants.py --tokenizer "$tokenizer" --output "$out/variants.md"
    measure profile-bf16 120 profile_step.py --set megatron.micro-batch-size=8 --flags "$graph"
    measure profile-fp8 120 profile_step.py --set megatron.micro-batch-size=8 \
        --flags "$graph --fp8-format hybrid --fp8-recipe delayed"
    measure train-speed 720 train_speed.py --heads 10 --steps 20 --limit 150
) &
(
    export CUDA_VISIBLE_DEVICES=1
    measure save-cost 300 save_cost.py
    measure largest-batch 900 largest_batch.py
    part guards 300 -m pytest tests/gpu/test_fused.py tests/gpu/test_guards.py -q -n 6 -p no:cacheprovider
    [ -z "${CHERRY_SHARDS:-}" ] && exit
    pair=models-2-mtp/seed-1
    part heads-own 600 -m cherry_megatron.cli experiment run moee --out "$out/work/heads" --only models-2-mtp --gpus 1
    part heads-shared 300 benchmarks/shared_depths.py --config "$out/work/heads/$pair/config.yaml" --set "run=$out/work/shared"
    cp "$out/work/heads/$pair/evaluations.jsonl" "$out/heads-own.jsonl"
    cp "$out/work/shared/evaluations.jsonl" "$out/heads-shared.jsonl"
) &
wait
measure moee-parallel 900 moee_speed.py --only parallel full --steps 12 --limit 160
part planner 600 benchmarks/calibrate_planner.py --tokenizer "$tokenizer" --data "$data" --work "$out/work/planner" \
    --check "$out/planner.md" --seconds 560
(
    export CUDA_VISIBLE_DEVICES=0
    measure precision-reduced 900 precision.py --only reduced
) &
(
    export CUDA_VISIBLE_DEVICES=1
    measure precision-full 900 precision.py --only full
) &
wait
measure scaling 600 scaling.py --work "$out/work/scaling" --seconds 570
measure host-resume 600 host_resume.py
