#!/bin/sh
# The demo: sentences of real Korean documentation -> tokenizer -> indexed tokens -> 48 layers -> 6, walked as 34 -> recovery
# -> a second expert -> a mixture of both -> a Korean sentence.
# What is done already is not done again; remove runs/demo to begin anew.
# usage: demo.sh CHERRY
set -eu
cherry=$1 run=runs/demo
python=$(dirname "$cherry")/python
step() {
    printf '\n$ cherry'
    printf ' %s' "$@"
    echo
    "$cherry" "$@"
}
[ -e $run/data/text.jsonl ] || "$python" tools/demo_text.py $run/data/text.jsonl
[ -d $run/data/tokenizer ] || step tokenizer --input $run/data/text.jsonl --output $run/data/tokenizer --vocab-size 4096
[ -e $run/data/text.idx ] || step data --input $run/data/text.jsonl --output $run/data/text --tokenizer $run/data/tokenizer
step pretrain --config configs/tiny_base.yaml
[ -d $run/compressed ] || step compress-depth --load $run/base --save $run/compressed --config configs/tiny_recover.yaml
[ -d $run/recovered/checkpoints ] || step evaluate --config configs/tiny_recover.yaml
step pretrain --config configs/tiny_recover.yaml
step pretrain --config configs/tiny_branch.yaml
[ -d $run/mixture ] || step assemble-moee --load $run/recovered $run/branch --save $run/mixture --config configs/tiny_mixture.yaml
step pretrain --config configs/tiny_mixture.yaml
step params configs/tiny_mixture.yaml
step lineage $run/moee
step generate --config configs/tiny_mixture.yaml --prompt "결제를 요청하면" --tokens 16 --temperature 0.3 --top-p 0.9
printf '\nTensorBoard: %s board %s\n' "$cherry" $run
