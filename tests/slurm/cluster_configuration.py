"""slurm.conf of the small cluster: quick to notice what dies, and to schedule again."""

CONFIGURATION = """\
ClusterName=small
SlurmctldHost={controller}({controller_address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,bf_continue,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=5
SlurmctldTimeout=5
MessageTimeout=3
TCPTimeout=1
KillWait=5
ReturnToService=2
MinJobAge=86400
JobCompType=jobcomp/filetxt
JobCompLoc={base}/jobcomp.txt
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
PropagatePrioProcess=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace} \
DefMemPerCPU=100
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF DefMemPerCPU=100
PartitionName=closed Nodes=ALL MaxTime=60 State=UP AllowGroups=nobody-is-in-it
"""
