#!/bin/bash
# Averages the layers of a run into the few of CONFIG (default configs/recover_227m.yaml), and writes to what its
# megatron.load names. Reads LOAD=RUN, else the run of FROM=CONFIG (default configs/base_1b.yaml). One node, no GPU.
#
#SBATCH --job-name=cherry-compress
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=compress_depth.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

FROM=${FROM:-configs/base_1b.yaml}
cherry_job compress-depth configs/recover_227m.yaml "$@"
