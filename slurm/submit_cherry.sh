#!/bin/bash
# Submits the chain from the dense parent to an evaluated mixture, each job after the one that it needs, and prints a
# table of stages, jobs and outputs. Run again it submits only what is neither finished nor in the queue.
#
#   bash slurm/submit_cherry.sh                DRY_RUN=1 prints what would be submitted
#   BASE_CONFIG=... BRANCH_CONFIG=... MIXTURE_CONFIG=... [SGT_CONFIG=...] bash slurm/submit_cherry.sh
#
# Needs `cherry` where it is run. See docs/slurm.md.
set -euo pipefail

script=submit_cherry.sh
# shellcheck source=slurm/common.sh
. "$(dirname "$0")/common.sh"
[ $# = 0 ] || fail "takes no arguments, but BASE_CONFIG, BRANCH_CONFIG, MIXTURE_CONFIG and SGT_CONFIG"
[ -z "${SLURM_JOB_ID:-}" ] || fail "a job submits no chain; run it outside of one"
base=${BASE_CONFIG:-configs/base_1b.yaml}
branch=${BRANCH_CONFIG:-configs/branch_227m.yaml}
mixture=${MIXTURE_CONFIG:-configs/cherry_1p8b.yaml}
cd "$root"
unset LOAD FROM BRANCHES AFTER COMMENT
DRY_RUN=0 CLUSTER_CONTAINER='' find_program # the chain is read here
links=$("${program[@]}" job chain --base "$base" --branches "$branch" --mixture "$mixture" \
    ${SGT_CONFIG:+--selective "$SGT_CONFIG"})
queue=
if [ "${DRY_RUN:-0}" = 0 ]; then
    command -v sbatch >/dev/null || fail "there is no sbatch here; run it on a SLURM login node, or with DRY_RUN=1"
    # A job that is being requeued is COMPLETING.
    states=PENDING,RUNNING,CONFIGURING,COMPLETING,SUSPENDED,STOPPED,SIGNALING,REQUEUED
    queue=$(timeout 60 squeue --noheader --me --states=$states --format='%F %T %k') ||
        fail "squeue does not answer; try again"
fi
line='%-9s %-13s %-10s %s\n'
# shellcheck disable=SC2059
table=$(printf "$line" stage job state output)
after='' # the job that the next one waits for
while IFS=$'\t' read -r name launcher config parent branches state output; do
    job=-
    mark="cherry $name $root/$output"
    if [ "$state" = left ]; then
        read -r job state < <(awk -v mark="$mark" '{ id = $1 " " $2; sub(/^[^ ]+ [^ ]+ /, "") } $0 == mark { print id; exit }' \
            <<<"$queue") || true
        if [ -z "$job" ]; then
            said=$(FROM=${parent#-} BRANCHES=${branches#-} AFTER=$after COMMENT=$mark bash "$slurm_folder/$launcher" "$config")
            [ "${DRY_RUN:-0}" = 0 ] || printf '%s\n\n' "$said"
            if [[ $said == *"Submitted batch job "* ]]; then
                job=${said##* } state=submitted
            else
                job=JOB_$name state=left
            fi
        fi
        after=$job
    fi
    # shellcheck disable=SC2059
    table+=$'\n'$(printf "$line" "$name" "$job" "$state" "$output")
done <<<"$links"
printf '%s\n' "$table"
