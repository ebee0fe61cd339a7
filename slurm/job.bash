# What all batch scripts have in common. They read it first; `bitdance submit` writes it into them.

stop=
trap 'stop=yes' USR1 TERM    # nothing more: a longer trap would race with the next signal
# Of the shell that sbatch was called in; srun takes the job's own, or refuses two that differ.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_PER_@}"

# What each start does before its step, behind the site's lines.
begin_start() {
    set -u    # not before: lines of modules and environments use variables that are not set
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
    local _
    for _ in $(seq $((${SLURM_RESTART_COUNT:-0} % 16))); do
        srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 true &
    done
    wait
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
    until now=$(scontrol show job "$job" --oneliner); do
        echo "waiting for Slurm's controller, to leave $SLURMD_NODENAME: $reason"
        [ -n "$stop" ] || ((SECONDS > 3600)) && exit 75
        sleep 2
    done
    # Else it was cancelled, or started elsewhere, meanwhile.
    [[ $now == *' JobState=RUNNING '* && $now == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || exit 75
    trap '' TERM    # comes with the requeue, and would end what follows it
    echo "bitdance: bad node $SLURMD_NODENAME: $reason"
    [ "$(grep '^bitdance: ' /proc/$$/fd/1 | tail -n 3 | grep -cF ": $reason")" = 3 ] && exit 78
    without=$(sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1,/p' <<< "$record")
    scontrol requeue "$job"
    scontrol update JobId="$job" ExcNodeList="${without#,}$SLURMD_NODENAME"
    exit 75
}

# Wait for the step, which is process $1; its exit code goes to $code. When this script is told to stop, the step is
# told so once, by the signal $2: it saves, and ends with code 75.
wait_for_step() {
    local step=$1 signal=$2 told=
    # Until it is srun, it is a copy of this script, whose trap would swallow the signal.
    while cmp -s "/proc/$$/cmdline" "/proc/$step/cmdline"; do sleep 0.05; done
    while :; do
        [ -n "$stop" ] && [ -z "$told" ] && kill -"$signal" "$step" 2> /dev/null && told=yes
        wait "$step"    # interrupted by a signal
        kill -0 "$step" 2> /dev/null || break
    done
    wait "$step"
    code=$?
    # What bash says of a step that a signal to the whole job has ended, and that it has told of already.
    ((code >= 0)) || code=$((128 + $(kill -l "$signal")))
}
