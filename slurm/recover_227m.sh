#!/bin/bash
# Recovers the compressed model as the experts of a mixture to be: an array job, one task a branch, one process a GPU.
# Task I trains CONFIG (default configs/branch_227m.yaml) with CHERRY_BRANCH=I; BRANCHES=0-3 trains those instead of 8.
#
#SBATCH --job-name=cherry-recover
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=recover_227m.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

cherry_job pretrain configs/branch_227m.yaml "$@"
