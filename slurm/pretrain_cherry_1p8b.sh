#!/bin/bash
# Pretrains a CHERRY model, one process a GPU. From the project's folder:
#
#   sbatch slurm/pretrain_cherry_1p8b.sh [CONFIG] [--set KEY=VALUE ...] [-- MEGATRON_FLAGS ...]
#   bash slurm/pretrain_cherry_1p8b.sh ...             submits it with the settings of slurm/cluster.env
#   DRY_RUN=1 bash slurm/pretrain_cherry_1p8b.sh ...   prints what would be submitted and started
#
# CONFIG is by default the 1.8B mixture, configs/cherry_1p8b.yaml, one expert a GPU. A first start loads LOAD=RUN, else
# what assemble_moee.sh has put into the run's folder; without either it trains from scratch. The other launchers of this
# folder take the same arguments. See docs/slurm.md.
#
# The defaults; sbatch's command line overrides them, and with `bash` so do the settings.
#
#SBATCH --job-name=cherry-pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

script=pretrain_cherry_1p8b.sh
# sbatch runs a copy of this file from elsewhere, so what lies beside it is found from where it was submitted.
for folder in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}/slurm" "${SLURM_SUBMIT_DIR:-.}"; do
    if [ -f "$folder/common.sh" ]; then break; fi
done
[ -f "$folder/common.sh" ] || { echo "$script: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=slurm/common.sh
. "$folder/common.sh"

cherry_job pretrain configs/cherry_1p8b.yaml "$@"
