#!/bin/bash
# Makes one mixture of runs, as `assembled` in the folder of CONFIG's run (default configs/cherry_1p8b.yaml). The experts
# are LOAD="RUN RUN ...", else the branches of FROM=CONFIG (default configs/branch_227m.yaml). One node, no GPU.
#
#SBATCH --job-name=cherry-assemble
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=assemble_moee.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

FROM=${FROM:-configs/branch_227m.yaml}
cherry_job assemble-moee configs/cherry_1p8b.yaml "$@"
