#!/bin/bash
# Trains on the selected tokens of answers, from LOAD=RUN, else what CONFIG names (default configs/sgt_1p8b.yaml, which
# starts from the mixture). `cherry data --sft` and `cherry select` make its text and marks (docs/sgt.md).
#
#SBATCH --job-name=cherry-sgt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=sgt_finetune.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

cherry_job pretrain configs/sgt_1p8b.yaml "$@"
