# shellcheck shell=bash
# What the launch scripts of this folder share: settings, submission, ranks, logs, requeue. Sourced, never run.
#
# A script sets `script` to its own name, sources this file and calls
#   cherry_job VERB DEFAULT_CONFIG [CONFIG] [--set KEY=VALUE ...] [-- MEGATRON_FLAGS ...]
# What a stage starts from, whether it is finished and what follows an attempt is decided by `cherry job`.

: "${script:?}"
slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${slurm_folder%/*}

fail() {
    printf '%s: %s\n' "$script" "$1" >&2
    exit 2
}

# --- settings: the environment, else slurm/cluster.env, else the script's #SBATCH lines ---

known_settings="CLUSTER_ACCOUNT CLUSTER_PARTITION CLUSTER_TIME CLUSTER_NODES CLUSTER_GPUS_PER_NODE \
CLUSTER_CPUS_PER_TASK CLUSTER_MODULES CLUSTER_VENV CLUSTER_CONTAINER CLUSTER_CONTAINER_MOUNTS \
CLUSTER_SBATCH_OPTIONS CLUSTER_SRUN_OPTIONS"

# A misspelled setting would go unnoticed until the job runs on the wrong nodes.
is_setting() {
    [[ " $known_settings " == *" $1 "* ]]
}

if [ -z "${SLURM_JOB_ID:-}" ]; then # nodes may have variables of their own
    for name in "${!CLUSTER_@}"; do
        is_setting "$name" ||
            fail "environment: unknown setting $name (if it is another program's, unset it); known are $known_settings"
    done
fi
if [ -f "$slurm_folder/cluster.env" ]; then
    while read -r name; do
        is_setting "$name" || fail "slurm/cluster.env: unknown setting $name; known are $known_settings"
    done < <(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?(CLUSTER_[A-Za-z0-9_]*)=.*/\2/p' "$slurm_folder/cluster.env")
    environment=$(export -p)
    set -a
    # shellcheck disable=SC1091
    . "$slurm_folder/cluster.env"
    set +a
    eval "$environment" # what the environment already held wins over the file
fi

positive='[1-9][0-9]{0,5}'
day_time='[0-9]{1,9}|[0-9]{1,6}:[0-9]{2}(:[0-9]{2})?|[0-9]{1,4}-[0-9]{1,2}(:[0-9]{2}){0,2}|UNLIMITED'
part='[0-9]{1,6}(-[0-9]{1,6})?'
tasks_of_array="$part(,$part)*(%$positive)?"

# check_value NAME VALUE PATTERN WHAT: refuses what sbatch would refuse, or understand otherwise.
check_value() {
    [ -z "$2" ] || [[ $2 =~ ^($3)$ ]] || fail "$1 is '$2'; it must be $4"
}

# Also in a job, and also those that the script at hand does not use: one file is for all of them.
check_value CLUSTER_TIME "${CLUSTER_TIME:-}" "$day_time" "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"
check_value CLUSTER_NODES "${CLUSTER_NODES:-}" "$positive" "a positive number"
check_value CLUSTER_GPUS_PER_NODE "${CLUSTER_GPUS_PER_NODE:-}" "([A-Za-z0-9_.-]+:)?$positive" \
    "a positive number, or TYPE:NUMBER"
check_value CLUSTER_CPUS_PER_TASK "${CLUSTER_CPUS_PER_TASK:-}" "$positive" "a positive number"
check_value BRANCHES "${BRANCHES:-}" "$tasks_of_array" "of the form 0-3,5"

# --- arguments ---

# Sets config, run, sets and flags.
parse_arguments() {
    config=$root/$1
    run=
    sets=()
    flags=()
    shift
    if [ $# -gt 0 ] && [[ $1 != -* ]]; then
        [ -f "$1" ] || fail "no configuration $1 in $PWD; name a YAML file by its path from here"
        config=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
        shift
    fi
    [ -f "$config" ] || fail "no configuration $config; name a YAML file"
    while [ $# -gt 0 ]; do
        case $1 in
            --set)
                [ $# -ge 2 ] || fail "--set needs KEY=VALUE"
                [[ $2 == run=* ]] && run=${2#run=}
                sets+=(--set "$2")
                shift 2
                ;;
            --)
                shift
                flags=(-- "$@")
                break
                ;;
            *) fail "do not know what to do with '$1'; Megatron's flags follow after --" ;;
        esac
    done
    given_run=$run
    find_run
}

# Sets run, which may depend on CHERRY_BRANCH.
find_run() {
    run=${given_run:-$(run_folder "$config")}
    [[ $run == /* ]] || run=$root/$run
}

# The value of a top-level key of a YAML file, or nothing.
yaml_value() {
    sed -nE "s/^$1:[[:space:]]*//p" "$2" | sed -E "s/[[:space:]]+#.*$//; s/[[:space:]]*$//; s/^(['\"])(.*)\1$/\2/" | head -n 1
}

# The run's folder, where the logs go, as a configuration or what it extends names it. Reads YAML
# without Python, which a login node need not have.
run_folder() {
    local file=$1 found='' parent
    for _ in 1 2 3 4 5 6 7 8; do
        [ -f "$file" ] || fail "$1 extends $file, which is not there"
        found=$(yaml_value run "$file")
        parent=$(yaml_value extends "$file")
        if [ -n "$found" ] || [ -z "$parent" ]; then break; fi
        file=$(dirname "$file")/$parent
    done
    local variable='\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}' value
    while [[ $found =~ $variable ]]; do
        value=${!BASH_REMATCH[1]:-${BASH_REMATCH[3]:-}}
        [ -n "$value" ] || fail "$1: its run folder needs the variable ${BASH_REMATCH[1]}; set it"
        found=${found/"${BASH_REMATCH[0]}"/"$value"}
    done
    [ -n "$found" ] || fail "$1 names no run folder; name it with --set run=FOLDER"
    printf '%s\n' "$found"
}

# --- what is submitted ---

# set_option NAME VALUE: replaces it among the options, or appends it.
set_option() {
    local i
    for i in "${!options[@]}"; do
        if [[ ${options[i]} == "--$1="* ]]; then
            options[i]=--$1=$2
            return
        fi
    done
    options+=("--$1=$2")
}

# The value that counts: the last one, as for sbatch.
get_option() {
    local option value=
    for option in "${options[@]}"; do
        [[ $option != "--$1="* ]] || value=${option#*=}
    done
    printf '%s\n' "$value"
}

# Sets options: the #SBATCH lines, overridden by the settings.
resolve_options() {
    local extra on_gpus name gpus=${CLUSTER_GPUS_PER_NODE:-}
    mapfile -t options < <(sed -n 's/^#SBATCH //p' "$slurm_folder/$script")
    [ -z "${CLUSTER_ACCOUNT:-}" ] || set_option account "$CLUSTER_ACCOUNT"
    [ -z "${CLUSTER_PARTITION:-}" ] || set_option partition "$CLUSTER_PARTITION"
    [ -z "${CLUSTER_TIME:-}" ] || set_option time "$CLUSTER_TIME"
    [ -z "${CLUSTER_CPUS_PER_TASK:-}" ] || set_option cpus-per-task "$CLUSTER_CPUS_PER_TASK"
    on_gpus=$(get_option gpus-per-node) # what uses no GPU runs on one node
    if [ -n "${CLUSTER_NODES:-}" ] && [ -n "$on_gpus" ]; then set_option nodes "$CLUSTER_NODES"; fi
    if [ -n "$gpus" ] && [ -n "$on_gpus" ]; then
        set_option gpus-per-node "$gpus"
        set_option ntasks-per-node "${gpus##*:}"
    fi
    set_option output "$run/logs/slurm-%j.out"
    # Only what is an array, one task a branch.
    if [ -n "${BRANCHES:-}" ] && [ -n "$(get_option array)" ]; then set_option array "$BRANCHES"; fi
    [ -z "${AFTER:-}" ] || options+=("--dependency=afterok:$AFTER" --kill-on-invalid-dep=yes)
    [ -z "${COMMENT:-}" ] || set_option comment "$COMMENT"
    read -ra extra <<<"${CLUSTER_SBATCH_OPTIONS:-}"
    options+=("${extra[@]}")
    for name in nodes ntasks-per-node cpus-per-task; do
        check_value "--$name of CLUSTER_SBATCH_OPTIONS" "$(get_option "$name")" "$positive" "a positive number"
    done
    check_value "--array of CLUSTER_SBATCH_OPTIONS" "$(get_option array)" "$tasks_of_array" "of the form 0-3,5"
}

# --- what is started in the job ---

# Sets program, the command `cherry`, and place, srun's options that put it into a container.
name_program() {
    place=()
    if [ -n "${CLUSTER_CONTAINER:-}" ]; then
        place=(--container-image="$CLUSTER_CONTAINER" --container-workdir="$root"
            --container-mounts="$root:$root${CLUSTER_CONTAINER_MOUNTS:+,$CLUSTER_CONTAINER_MOUNTS}")
    fi
    if [ -n "${CHERRY:-}" ]; then
        read -ra program <<<"$CHERRY"
    elif [ -n "${CLUSTER_VENV:-}" ]; then
        program=("$CLUSTER_VENV/bin/cherry")
    elif [ -z "${CLUSTER_CONTAINER:-}" ] && [ -x "$root/.venv/bin/cherry" ]; then
        program=("$root/.venv/bin/cherry")
    else
        program=(cherry)
    fi
}

# The same, and sees that it is there.
find_program() {
    name_program
    if [ "${DRY_RUN:-0}" = 0 ] && [ -z "${CLUSTER_CONTAINER:-}" ]; then
        command -v "${program[0]}" >/dev/null || fail "there is no command ${program[0]}; set CLUSTER_VENV or CHERRY"
    fi
}

# Refuses a configuration before it waits in the queue, where `cherry` runs on this machine too.
check_stage() {
    local said status=0
    name_program
    if [ -n "${CLUSTER_CONTAINER:-}" ] || ! command -v "${program[0]}" >/dev/null; then return; fi
    said=$(ask check 2>&1) || status=$?
    [ "$status" != 2 ] || fail "${said##*$'\n'}" # another status says that it does not run here
}

# make_launch VERB NODES TASKS_PER_NODE CPUS_PER_TASK [ARGUMENTS]: sets launch, the srun command.
# One task a GPU: srun gives each its rank, and `cherry` takes it from SLURM_PROCID. Each task sees
# all GPUs of its node (no --gpus-per-task), which is what NCCL and LOCAL_RANK expect.
make_launch() {
    local extra
    launch=(srun --nodes="$2" --ntasks="$(($2 * $3))" --ntasks-per-node="$3"
        --cpus-per-task="$4" # srun no longer takes it from sbatch (SLURM 22.05)
        --kill-on-bad-exit=1 # one rank that fails would leave the others waiting for it
        --open-mode=append --output="$run/logs/slurm-%j-%t.out")
    read -ra extra <<<"${CLUSTER_SRUN_OPTIONS:-}"
    launch+=("${place[@]}" "${extra[@]}" "${program[@]}" "$1" --config "$config")
    shift 4
    launch+=("$@" "${sets[@]}" "${flags[@]}") # what the command line sets wins
}

# ask ACTION [OPTIONS]: `cherry job` of this stage, in a container if there is one.
ask() {
    local action=$1 sources where=()
    shift
    read -ra sources <<<"${LOAD:-}"
    [ -z "${CLUSTER_CONTAINER:-}" ] || where=(srun --nodes=1 --ntasks=1 "${place[@]}")
    "${where[@]}" "${program[@]}" job "$action" "$verb" --config "$config" ${FROM:+--parent "$FROM"} \
        ${sources[0]:+--load "${sources[@]}"} "$@" "${sets[@]}" "${flags[@]}"
}

load_modules() {
    [ -n "${CLUSTER_MODULES:-}" ] || return 0
    type module >/dev/null 2>&1 || fail "CLUSTER_MODULES is set, but the job's shell has no command 'module'"
    set +eu +o pipefail # module systems are not written for strict shells
    # shellcheck disable=SC2086
    module load $CLUSTER_MODULES || fail "cannot load the modules $CLUSTER_MODULES"
    set -euo pipefail
}

# The allocation decides how many, not the settings: sbatch's command line may have asked for something else.
start_job() {
    local nodes=${SLURM_JOB_NUM_NODES:-1} cpus=${SLURM_CPUS_PER_TASK:-1} hosts said status=0 added=()
    local tasks=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
    tasks=${tasks##*:}
    [ "$tasks" != 0 ] || tasks=${SLURM_NTASKS_PER_NODE:-1} # a rehearsal on nodes without GPUs
    load_modules
    cd "$root"
    find_program
    job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    records=$run/jobs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(head -n 1 <<<"$hosts")
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems hand out by themselves
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE # of the shell that submitted: each task gets its own
    printf '%s: job %s, start %s, %s nodes of %s tasks, master %s:%s\n' "$script" "$SLURM_JOB_ID" \
        "$((${SLURM_RESTART_COUNT:-0} + 1))" "$nodes" "$tasks" "$MASTER_ADDR" "$MASTER_PORT"
    said=$(ask begin --records "$records") || status=$?
    [ "$status" != 10 ] || exit 0 # there is nothing to do
    [ "$status" = 0 ] || exit "$status"
    [ -z "$said" ] || mapfile -t added <<<"$said"
    make_launch "$verb" "$nodes" "$tasks" "$cpus" "${added[@]}"
    print_command "${launch[@]}"
    run_ranks
    follow_up
}

# Sets status, that of the ranks. A signal to this shell is one to them, on which they save at the end of their step.
run_ranks() {
    # What srun says is kept, because it names the node of the rank that failed.
    "${launch[@]}" 2> >(trap '' TERM USR1 && exec tee -a "$records/srun.err" >&2) &
    local child=$! interrupted
    # srun hands SIGUSR1 on to the ranks; to SIGTERM it would answer by killing them.
    trap 'interrupted=1; kill -USR1 "$child" 2>/dev/null || true' TERM USR1
    while :; do
        interrupted=
        status=0
        wait "$child" || status=$?
        [ -n "$interrupted" ] || break
        requeue_at_limit
    done
}

# SLURM requeues nothing that it ends at its time limit, and kills this shell too if saving takes longer than KillWait.
requeue_at_limit() {
    [ "$(timeout 60 squeue --noheader --jobs="$job" --format=%r 2>/dev/null)" = TimeLimit ] || return 0
    scontrol requeue "$job" || return 0
    echo "$script: requeued at its time limit, which came before the ranks had saved"
}

# Ends the job as what became of its ranks asks for.
follow_up() {
    local state without verdict=0
    # Not RUNNING: SLURM has cancelled or requeued it, which is not to be undone. Its controller may be away for a while.
    for _ in {1..10}; do
        state=$(timeout 60 squeue --noheader --jobs="$job" --format=%T 2>/dev/null) && break
        state=UNKNOWN
        sleep 30
    done
    without=$(ask end --status "$status" --state "$state" --errors "$records/srun.err") || verdict=$?
    [ "$verdict" = 10 ] || exit "$verdict"
    [ -z "$without" ] || find_exclusion "$without"
    trap '' TERM USR1 # with which SLURM ends what is requeued
    scontrol requeue "$job" || fail "job $job cannot be requeued; submit the same line again to go on"
    # Only a waiting job can be told so.
    if [ -n "$without" ] && scontrol update JobId="$job" ExcNodeList="$without"; then
        echo "$script: requeued without $without"
    fi
    exit 0
}

# find_exclusion NODES: sets without, all that the job is to do without; nothing if there are not enough others.
find_exclusion() {
    local others before
    others=$(timeout 60 sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --responding --format='%N %t' |
        awk '$2 !~ /drain|drng|down|fail|maint|boot/ { print $1 }' | sort -u | grep -cvxF "$(tr , '\n' <<<"$1")") || others=0
    if [ "$others" -lt "$SLURM_JOB_NUM_NODES" ]; then
        echo "$script: there are not enough nodes to do without $1"
        without=
        return
    fi
    before=$(timeout 60 scontrol show job "$job" | sed -nE 's/.* ExcNodeList=(.*)/\1/p')
    case $before in
        '' | '(null)') ;;
        *) without=$before,$1 ;;
    esac
}

print_command() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

make_logs() {
    mkdir -p "$run/logs" 2>/dev/null || fail "cannot write the run's folder $run"
}

# The numbers of an array such as 0-3,5%2, a line each.
array_numbers() {
    local parts=${1%%%*} part number
    for part in ${parts//,/ }; do
        for ((number = 10#${part%-*}; number <= 10#${part#*-}; number++)); do echo "$number"; done
    done
}

cherry_job() {
    verb=$1
    local default=$2 submission tasks array number numbers=
    shift 2
    # A configuration of branches is that of one branch in each task of an array.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || export CHERRY_BRANCH=$SLURM_ARRAY_TASK_ID
    parse_arguments "$default" "$@"
    if [ -n "${SLURM_JOB_ID:-}" ] && [ "${DRY_RUN:-0}" = 0 ]; then
        make_logs
        start_job
    fi
    cd "$root" # where the job finds slurm/common.sh, and what relative paths in a configuration are relative to
    resolve_options
    array=$(get_option array)
    if [ -n "$array" ]; then
        numbers=$(array_numbers "$array")
        [ -n "$numbers" ] || fail "the array $array has no task; write it as 0-3,5"
        CHERRY_BRANCH=${numbers%%$'\n'*} check_stage # one for all
        CHERRY_BRANCH=%a find_run                    # which sbatch replaces
        set_option output "$run/logs/slurm-%j.out"
    else
        check_stage
    fi
    submission=(sbatch "${options[@]}" "$slurm_folder/$script" "$config" "${sets[@]}" "${flags[@]}")
    if [ "${DRY_RUN:-0}" != 0 ]; then
        tasks=$(get_option ntasks-per-node)
        find_program
        make_launch "$verb" "$(get_option nodes)" "${tasks:-1}" "$(get_option cpus-per-task)"
        echo "# submitted, from $root${LOAD:+, with LOAD=$LOAD}${FROM:+, with FROM=$FROM}:"
        print_command "${submission[@]}"
        echo "# started in the job, with MASTER_ADDR its first node and MASTER_PORT 10000 + job id % 20000, and with"
        echo "# what \`cherry job begin\` adds there (what to load, where to write):"
        print_command "${launch[@]}"
        return
    fi
    command -v sbatch >/dev/null ||
        fail "there is no sbatch here; run it on a SLURM login node, or with DRY_RUN=1 to see what it would submit"
    for number in ${numbers:-none}; do
        [ "$number" = none ] || CHERRY_BRANCH=$number find_run
        make_logs
    done
    exec "${submission[@]}"
}
