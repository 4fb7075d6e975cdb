#!/bin/bash
# Measures the held-out loss of a run by loops (default configs/cherry_1p8b.yaml), one process a GPU.
#
#SBATCH --job-name=cherry-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=evaluate.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

cherry_job evaluate configs/cherry_1p8b.yaml "$@"
