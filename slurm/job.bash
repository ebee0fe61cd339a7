# What all batch scripts have in common. They read it first; `bitdance submit` writes it into them.

stop= step= teller=
hear() {
    stop=yes
    tell_step
}
trap hear USR1 TERM
# Of the shell that sbatch was called in; srun takes the job's own, or refuses two that differ.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_PER_@}"

# What each start does before its step, behind the site's lines.
begin_start() {
    # Not before: lines of modules and environments use variables that are not set. The others are as bash has them,
    # whatever the site's lines have set: what fails here is looked at, and must not end the script.
    set -u +eE +o pipefail +o posix
    IFS=$' \t\n'
    trap : ERR DEBUG RETURN    # one that is removed here is back when the function returns
    trap hear USR1 TERM
    PYTHON=${PYTHON:-$PWD/.venv/bin/python}
    local record said
    record=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep "^JobId=$SLURM_JOB_ID ")
    keep_own_variables "$record"
    # A signal to the whole job is for this script: a Python that it ends is not a bad one.
    said=$(trap '' USR1 TERM; "$PYTHON" -c 'import slurm.after' 2>&1) ||
        leave_node "no working $PYTHON: ${said##*$'\n'}" "$record"
    echo "bitdance: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -Is)"
    # Empty steps, one more at each start. Slurm numbers the steps of each start from 0; an earlier start may live
    # on, on a node that is cut off, and end its own step by that number when the node comes back.
    local _ empty=()
    for _ in $(seq $((${SLURM_RESTART_COUNT:-0} % 16))); do
        srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 true &
        empty+=($!)
    done
    # Not for all: the site's lines may have left something that runs on.
    ((${#empty[@]} == 0)) || wait "${empty[@]}" || :
}

# sbatch hands on what it finds in a shell that is itself in a job: what Slurm does not say of this job is not its.
keep_own_variables() {
    local record=$1
    [ -n "$record" ] || return
    [[ $record == *' Restarts=0 '* ]] && unset SLURM_RESTART_COUNT
    [[ $record == *' ArrayTaskId='* ]] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
    [[ $record == *' NtasksPerN:B:S:C=0:'* ]] && unset SLURM_NTASKS_PER_NODE
    [[ $record =~ ' TresPerJob='[^\ ]*gpu ]] || unset SLURM_GPUS
    [[ $record =~ ' TresPerTask='[^\ ]*gpu ]] || unset SLURM_GPUS_PER_TASK
}

# The job goes on without this node, unless its last three starts have said the same. In bash, for a node without a
# working interpreter cannot run `slurm.after`.
leave_node() {
    local reason=$1 record=$2 now without job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    [ -n "$record" ] || echo "when Slurm's controller answers again, the job leaves $SLURMD_NODENAME: $reason"
    now=$(patiently scontrol show job "$job" --oneliner)
    # Else it was cancelled, or started elsewhere, meanwhile.
    [[ $now == *' JobState=RUNNING '* && $now == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || exit 75
    trap '' TERM    # comes with the requeue, and would end what follows it
    echo "bitdance: bad node $SLURMD_NODENAME: $reason"
    [ "$(grep '^bitdance: ' /proc/$$/fd/1 | tail -n 3 | grep -cF ": $reason")" = 3 ] && exit 78
    without=$(sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1,/p' <<< "$now")
    patiently scontrol requeue "$job"
    patiently scontrol update JobId="$job" ExcNodeList="${without#,}$SLURMD_NODENAME"
    exit 75
}

# What a command of Slurm's says; again and again while the controller is away, for an hour at most.
patiently() {
    local said
    until said=$("$@" 2>&1); do
        [[ $said =~ [Uu]nable\ to\ contact|Socket\ timed\ out|Zero\ Bytes ]] && ((SECONDS < 3600)) || break
        sleep 2
    done
    echo "$said"
}

# Wait for the step, which is process $1; its exit code goes to $code.
wait_for_step() {
    step=$1
    [ -z "$stop" ] || tell_step
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done    # which a signal interrupts
    wait "$step"
    code=$?
    # What bash says of a step that ends in the moment of a signal, when it has told of its end already.
    ((code >= 0)) || code=$((128 + $(kill -l USR1)))
    step=
    [ -z "$teller" ] || kill -KILL "$teller" 2> /dev/null
    trap '' USR1 TERM    # what comes now would end the interpreter that decides, before it can ignore them
}

# When this script is told to stop, so is its step: a stage saves, a command ends. By USR1: at a TERM srun kills its
# tasks at once. Again and again: it drops what comes before it has launched them.
tell_step() {
    [ -n "$step" ] && [ -z "$teller" ] || return
    (
        trap '' USR1 TERM
        pause=1
        while kill -USR1 "$step"; do
            sleep $pause
            pause=$((pause * 2))
        done
    ) &> /dev/null &
    teller=$!
    disown "$teller" 2> /dev/null    # or bash tells of its end
}
