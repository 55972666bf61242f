#!/usr/bin/env bash
# Trains with N processes on this machine, over loopback: what many hosts do, without the hosts.
#
#   bash launch/local.sh N --config=configs/emoji.py --workdir=runs/emoji [--config.KEY=VALUE ...]
#
# Process I writes to WORKDIR/logs/process-I.log; process 0 is shown here too. Ctrl-C, or SIGTERM,
# lets every process save and stop; a second one stops them at once. Where one fails, the others are
# stopped. The same command again goes on. PYTHON=/path/to/python chooses the interpreter.
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
  # In the background SIGINT is ignored, so that every process gets what Ctrl-C means as SIGTERM.
  local signal=TERM
  if [[ -n $stopping ]]; then signal=KILL; fi
  stopping=yes
  kill -s "$signal" "${processes[@]}" 2>/dev/null || true
}
trap stop_all INT TERM

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# Threads: on CPUs every collective that waits for the other processes blocks one, and with few of
# them the processes can wait for each other for ever.
export NPROC=${NPROC:-64}
for ((i = 0; i < count; i++)); do
  echo "--- $(date '+%F %T'), process $i of $count" >>"$logs/process-$i.log"
  "$python" -m grape_jax.train "$@" \
    --coordinator="127.0.0.1:$port" --process_id="$i" --process_count="$count" \
    >>"$logs/process-$i.log" 2>&1 </dev/null &
  processes+=($!)
done
# A signal that came before the last process was on the list has missed it.
if [[ -n $stopping ]]; then
  stopping=
  stop_all
fi
tail -n 0 -F "$logs/process-0.log" &
shown=$!

# Waits for whichever ends next; a signal ends a wait early, and what still runs is waited for again.
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
