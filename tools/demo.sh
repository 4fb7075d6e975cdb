#!/bin/sh
# The demo: real Korean documentation -> tokenizer -> indexed tokens -> a trained recurrent model,
# its checkpoints, its TensorBoard run and its held-out loss against loops.
# usage: demo.sh CHERRY RUN
set -eu
cherry=$1 run=$2
python=$(dirname "$cherry")/python
docs=$("$python" -c 'import importlib.util as u, pathlib; print(
    pathlib.Path(u.find_spec("portone_mcp_server").origin).parent / "resources/docs/opi/ko")')
[ -d "$run/data/tokenizer" ] || "$cherry" tokenizer --input "$docs" --output "$run/data/tokenizer" --vocab-size 4096
[ -e "$run/data/text.idx" ] || "$cherry" data --input "$docs" --output "$run/data/text" --tokenizer "$run/data/tokenizer"
"$cherry" params configs/cherry_tiny.yaml
"$cherry" pretrain --config configs/cherry_tiny.yaml --set "run=$run"
"$cherry" evaluate --config configs/cherry_tiny.yaml --set "run=$run"
echo "TensorBoard: $(dirname "$cherry")/tensorboard --logdir $run/tensorboard"
