#!/bin/bash
# Pretrains the dense parent, 48 layers of 1.0B, one process a GPU. Arguments: see pretrain_cherry_1p8b.sh.
#
#SBATCH --job-name=cherry-base
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=pretrain_base_1b.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

cherry_job pretrain configs/base_1b.yaml "$@"
