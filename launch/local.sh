#!/usr/bin/env bash
# Trains with N processes on this machine, which communicate over loopback like several hosts.
#
#   bash launch/local.sh N --config=configs/emoji.py --workdir=runs/emoji [--config.KEY=VALUE ...]
#
# Process I logs to WORKDIR/logs/process-I.log; the log of process 0 is also printed. Ctrl-C or
# SIGTERM lets every process save and stop; a second one stops them at once. If one fails, the others
# are stopped. The same command resumes the run. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail

say() { echo "error: $*" >&2; }

count=${1:-}
if [[ ! $count =~ ^[1-9][0-9]*$ ]]; then
  say "give the number of processes first: bash launch/local.sh 2 --config=configs/emoji.py --workdir=runs/emoji."
  exit 2
fi
shift
workdir=
for argument in "$@"; do
  if [[ $argument == --workdir=* ]]; then workdir=${argument#--workdir=}; fi
done
if [[ -z $workdir || $workdir == *://* ]]; then
  say "give a local folder for run and logs: add --workdir=runs/emoji."
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
  python=$root/.venv/bin/python
  if [[ ! -x $python ]]; then python=python3; fi
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

logs=$workdir/logs
mkdir -p "$logs"
processes=()
stopping=
failed=0

stop_all() {
  # Background processes ignore SIGINT, so Ctrl-C is forwarded as SIGTERM.
  local signal=TERM
  if [[ -n $stopping ]]; then signal=KILL; fi
  stopping=yes
  kill -s "$signal" "${processes[@]}" 2>/dev/null || true
}
trap stop_all INT TERM

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# XLA's threads: on CPUs each collective blocks a thread while it waits for the other processes, and
# with too few threads the processes deadlock.
export NPROC=${NPROC:-64}
for ((i = 0; i < count; i++)); do
  echo "--- $(date '+%F %T'), process $i of $count" >>"$logs/process-$i.log"
  "$python" -m grape_jax.train "$@" \
    --coordinator="127.0.0.1:$port" --process_id="$i" --process_count="$count" \
    >>"$logs/process-$i.log" 2>&1 </dev/null &
  processes+=($!)
done
# A signal during the start did not reach the processes that were started after it.
if [[ -n $stopping ]]; then
  stopping=
  stop_all
fi
tail -n 0 -F "$logs/process-0.log" &
shown=$!

# Waits for the next process to end. A signal interrupts the wait, so running processes are checked.
running=("${processes[@]}")
while ((${#running[@]})); do
  wait -n "${running[@]}" || true
  still=()
  for process in "${running[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      still+=("$process")
    else
      wait "$process" && status=0 || status=$?
      if ((status && !failed)); then
        failed=$status
        if [[ -z $stopping ]]; then
          say "a process ended with $status and the others are stopped: see $logs."
          stop_all
        fi
      fi
    fi
  done
  running=("${still[@]}")
done
kill "$shown" 2>/dev/null || true
exit "$failed"
