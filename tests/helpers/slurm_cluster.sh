#!/usr/bin/env bash
# A private Slurm cluster of two nodes on one machine, for tests/test_slurm.py: each node is a network namespace with a
# host name and an address of its own. Without systemd and without a GPU: a node's two GPUs are names of /dev/null.
#
#     tests/helpers/slurm_cluster.sh start        prints the file to source; leaves what runs alone, revives dead nodes
#     tests/helpers/slurm_cluster.sh kill node2   pulls its network cable, then kills its processes
#     tests/helpers/slurm_cluster.sh stop         ends all of it and removes its folder
#
# Needs root and Debian's or Ubuntu's munge, slurmctld, slurmd, slurm-client, iproute2. Settings: SLURM_CLUSTER, its
# folder; SLURM_CLUSTER_SUBNET and SLURM_CLUSTER_PORT, where the defaults are taken.
#
# Shorter than on a real cluster, so that tests end: KillWait 10 s (30), SlurmdTimeout 20 s (300), a requeued job is
# held back 6 s (121), a preempted one has 20 s of grace.
set -euo pipefail
umask 022
PATH=$PATH:/usr/sbin:/sbin
FOLDER=${SLURM_CLUSTER:-${TMPDIR:-/tmp}/dalitune-slurm}
SUBNET=${SLURM_CLUSTER_SUBNET:-10.213.77}
PORT=${SLURM_CLUSTER_PORT:-16817}
NODES=(node1 node2)
BRIDGE=dalitune0
export SLURM_CONF=$FOLDER/slurm.conf

is_running() { # PIDFILE NAME: the process of that file, if it is the one that is meant
  local pid
  pid=$(cat "$1" 2>/dev/null) && grep -q "^$2" "/proc/$pid/comm" 2>/dev/null &&
    ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status"
}
wait_for() { # SECONDS COMMAND...
  local tries=$(($1 * 5)); shift
  for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  return 1
}
end() { # PIDFILE NAME
  local pid
  if is_running "$1" "$2"; then
    pid=$(cat "$1"); kill "$pid"
    for _ in $(seq 50); do is_running "$1" "$2" || break; sleep 0.2; done
    if is_running "$1" "$2"; then kill -KILL "$pid"; fi
  fi
  rm -f "$1"
}
nodes_are_up() { [ "$(timeout 3 sinfo -hN -p gpu -o %t | grep -cE '^(idle|mix|alloc)$')" = ${#NODES[@]} ]; }

start() {
  for tool in munged slurmctld slurmd sbatch ip nsenter unshare; do
    command -v "$tool" >/dev/null || { echo "missing: $tool" >&2; exit 3; }
  done
  [ "$(id -u)" = 0 ] || { echo "needs root" >&2; exit 3; }
  mkdir -p "$FOLDER"/{log,run,state,spool,munge}
  network
  configure
  if ! is_running "$FOLDER/run/munged.pid" munged; then
    rm -f "$FOLDER"/munge/socket*
    munged --force --num-threads 2 --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" \
      --pid-file="$FOLDER/run/munged.pid" --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge/seed"
  fi
  is_running "$FOLDER/run/slurmctld.pid" slurmctld || slurmctld -f "$SLURM_CONF"
  wait_for 10 timeout 3 sinfo -h || { tail -5 "$FOLDER/log/slurmctld.log" >&2; exit 3; }
  for node in "${NODES[@]}"; do
    is_running "$FOLDER/run/slurmd.$node.pid" slurmd ||
      nsenter -t "$(cat "$FOLDER/run/$node.pid")" -n -u -m slurmd -N "$node" -f "$SLURM_CONF"
  done
  if ! wait_for 30 nodes_are_up; then
    timeout 5 scontrol update nodename="node[1-2]" state=resume || true
    wait_for 20 nodes_are_up || { sinfo -N -l >&2; echo "nodes did not come up: $FOLDER/log" >&2; exit 3; }
  fi
  echo "export SLURM_CONF=$SLURM_CONF" >"$FOLDER/env.sh"
  echo "$FOLDER/env.sh"
}

network() {
  { echo "127.0.0.1 localhost"; echo "$SUBNET.1 $(hostname -s)"
    for i in "${!NODES[@]}"; do echo "$SUBNET.$((11 + i)) ${NODES[i]}"; done; } >"$FOLDER/hosts"
  if ! ip link show "$BRIDGE" >/dev/null 2>&1; then
    ip link add "$BRIDGE" type bridge; ip addr add "$SUBNET.1/24" dev "$BRIDGE"; ip link set "$BRIDGE" up
  fi
  for i in "${!NODES[@]}"; do
    local node=${NODES[i]} holder
    is_running "$FOLDER/run/$node.pid" sleep && continue
    # A sleeping process keeps the node's namespaces alive.
    setsid unshare -n -u -m --propagation private bash -c \
      "hostname $node && mount --bind '$FOLDER/hosts' /etc/hosts && ip link set lo up && exec sleep infinity" \
      </dev/null >"$FOLDER/log/$node.log" 2>&1 &
    holder=$!; echo "$holder" >"$FOLDER/run/$node.pid"
    wait_for 10 grep -q ^sleep "/proc/$holder/comm"
    ip link del "dalitune-n$i" 2>/dev/null || true
    ip link add "dalitune-n$i" type veth peer name eth0 netns "$holder"
    ip link set "dalitune-n$i" master "$BRIDGE" up
    nsenter -t "$holder" -n ip addr add "$SUBNET.$((11 + i))/24" dev eth0
    nsenter -t "$holder" -n ip link set eth0 up
  done
}

configure() {
  [ -s "$FOLDER/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$FOLDER/munge/key")
  # As on a real cluster, a signal to a step then reaches its task only. linuxproc, for machines without cgroup v1's
  # freezer, sends it to every process of the step.
  local tracking=linuxproc
  [ -d /sys/fs/cgroup/freezer ] && tracking=cgroup
  printf '%s\n' "CgroupMountpoint=/sys/fs/cgroup" "CgroupPlugin=cgroup/v1" "CgroupAutomount=no" >"$FOLDER/cgroup.conf"
  for i in 0 1; do [ -c "$FOLDER/gpu$i" ] || mknod "$FOLDER/gpu$i" c 1 3; done
  echo "NodeName=node[1-2] Name=gpu File=$FOLDER/gpu[0-1] Flags=nvidia_gpu_env" >"$FOLDER/gres.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=dalitune
SlurmctldHost=$(hostname -s)($SUBNET.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job is held back
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmdPidFile=$FOLDER/run/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
$(for i in 0 1; do
  echo "NodeName=node$((i + 1)) NodeAddr=$SUBNET.$((11 + i)) Port=$((PORT + 10 + i)) CPUs=16 RealMemory=256000 Gres=gpu:2"
done)
PartitionName=gpu Nodes=node[1-2] Default=YES DefaultTime=10 PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=urgent Nodes=node[1-2] DefaultTime=10 PriorityTier=10 PreemptMode=OFF
CONF
}

kill_node() {
  local space pid
  space=$(readlink "/proc/$(cat "$FOLDER/run/$1.pid")/ns/net")
  ip link set "dalitune-n$((${1#node} - 1))" down # first: a dying node sends no farewell
  for pid in /proc/[0-9]*; do
    [ "$(readlink "$pid/ns/net" 2>/dev/null)" != "$space" ] || kill -KILL "${pid#/proc/}" 2>/dev/null || true
  done
}

stop() {
  [ -d "$FOLDER" ] || return 0
  if is_running "$FOLDER/run/slurmctld.pid" slurmctld; then
    timeout 10 scancel -f --me 2>/dev/null || true
    wait_for 15 sh -c '[ -z "$(timeout 5 squeue -h)" ]' || true
  fi
  for node in "${NODES[@]}"; do end "$FOLDER/run/slurmd.$node.pid" slurmd; done
  # What is left of jobs, as a rank whose launcher died first, is told by its environment.
  for pid in /proc/[0-9]*; do
    if tr '\0' '\n' 2>/dev/null <"$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" &&
      { tr '\0' '\n' 2>/dev/null <"$pid/environ" | grep -q ^SLURM_JOB_ID= || grep -qs slurmstepd "$pid/comm"; }; then
      kill -KILL "${pid#/proc/}" 2>/dev/null || true
    fi
  done
  end "$FOLDER/run/slurmctld.pid" slurmctld
  end "$FOLDER/run/munged.pid" munged
  for node in "${NODES[@]}"; do end "$FOLDER/run/$node.pid" sleep; done
  for i in "${!NODES[@]}"; do ip link del "dalitune-n$i" 2>/dev/null || true; done
  ip link del "$BRIDGE" 2>/dev/null || true
  find /sys/fs/cgroup/freezer/slurm_node[12] -depth -type d -exec rmdir {} \; 2>/dev/null || true
  rm -rf "$FOLDER"
}

case ${1:-} in
  start) start ;;
  kill) kill_node "$2" ;;
  stop) stop ;;
  *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
