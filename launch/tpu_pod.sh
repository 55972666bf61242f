#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size, through gcloud.
#
#   bash launch/tpu_pod.sh start --name=RUN --zone=ZONE --type=v5litepod-256 -- \
#     --config=configs/emoji.py --workdir=gs://BUCKET/RUN [--config.KEY=VALUE ...]
#   bash launch/tpu_pod.sh logs|status|stop|delete --name=RUN --zone=ZONE
#   bash launch/tpu_pod.sh watch ...          # start, and restart after each preemption
#
# start   creates the slice RUN unless it exists, copies this checkout to every worker, installs it
#         and starts the run in the background. A running RUN is stopped first, which saves it, so the
#         same command resumes it with the current code. Runs and data beside the code are kept.
# watch   starts, checks every --poll seconds (60), recreates a lost slice and restarts an interrupted
#         run, until the run has ended or was stopped by this script. Needs a workdir in a bucket,
#         because the disks of a slice are lost with it.
# logs    follows the log of --worker=I (0).
# status  prints the state of the slice, and the state and the last log line of every worker.
# stop    sends SIGTERM to every worker; the run saves and ends. The slice remains, and is billed.
# delete  deletes the slice and its disks.
#
#   --project=ID     default: gcloud's
#   --runtime=IMAGE  version of the TPU software; default: chosen by the type
#   --queued         requests the slice as a queued resource and waits for it
#   --spot           a cheaper slice that can be preempted; --reserved: from a reservation
#   --poll=SECONDS   interval between checks of the slice
#   --dry-run        prints the commands without running them
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

command=${1:-}
given=("${@:2}")
case $command in
  start | watch | logs | status | stop | delete) shift ;;
  *) fail "give a command first: start, watch, logs, status, stop or delete (see the head of the script)." ;;
esac
name='' zone='' type='' runtime='' project='' worker=0 poll=60 queued='' dry=''
tier=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --queued) queued=yes ;;
    --spot | --reserved) tier+=("$1") ;;
    --dry-run) dry=yes ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is not an option of this script: give training arguments after --." ;;
  esac
  shift
done
if [[ -z $name || -z $zone ]]; then fail "give --name=RUN and --zone=ZONE."; fi
if [[ ! $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]]; then
  fail "--name=$name: a slice's name has lower-case letters, digits and dashes, and starts with a letter."
fi
workdir=
for argument in "$@"; do
  if [[ $argument == --workdir=* ]]; then workdir=${argument#--workdir=}; fi
done
place=(--zone="$zone" ${project:+--project="$project"})

check_start() {
  if [[ -z $type ]]; then fail "give --type=TYPE, such as v5litepod-256, v6e-64 or v5p-128."; fi
  if [[ -z $workdir ]]; then fail "give training its --workdir=gs://BUCKET/RUN, after --."; fi
  if [[ $workdir != gs://* && ($command == watch || " ${tier[*]-} " == *" --spot "*) ]]; then
    fail "--workdir=$workdir is lost with the slice: give one in a bucket (gs://BUCKET/RUN)."
  fi
  if [[ -n $runtime ]]; then return; fi
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type=$type: add --runtime=IMAGE." ;;
  esac
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Prints the state of the slice: "" if there is none, UNKNOWN if gcloud fails. A dry run prints the
# command to stderr and assumes that there is none.
state() {
  if [[ -n $dry ]]; then
    run "$@" >&2
    return
  fi
  local problem found
  problem=$(mktemp)
  if found=$("$@" 2>"$problem"); then
    echo "$found"
  elif ! grep -qiE 'NOT_FOUND|was not found' "$problem"; then
    cat "$problem" >&2
    echo UNKNOWN
  fi
  rm -f "$problem"
}

slice_state() {
  state gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)'
}

queue_state() {
  state gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)'
}

delete() {
  if [[ -n $queued || ! $(queue_state) =~ ^(UNKNOWN)?$ ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

make_slice() {
  while :; do
    case $(slice_state) in
      READY) return ;;
      PREEMPTED | TERMINATED) delete ;;
      STOPPED) fail "the slice $name is stopped: start it (gcloud compute tpus tpu-vm start), or delete it with this script." ;;
      UNKNOWN) fail "gcloud cannot read the state of the slice $name: fix the error above." ;;
      '') if [[ -n $queued ]]; then ask_queue; else create; fi ;;
      *) sleep "$poll" ;; # being created
    esac
    if [[ -n $dry ]]; then return; fi
  done
}

create() {
  run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
    --version="$runtime" ${tier[@]+"${tier[@]}"}
}

ask_queue() {
  case $(queue_state) in
    '')
      run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
        --accelerator-type="$type" --runtime-version="$runtime" ${tier[@]+"${tier[@]}"}
      ;;
    FAILED | SUSPENDED) delete ;;
    *)
      echo "$(date '+%T') $name is in the queue."
      sleep "$poll"
      ;;
  esac
}

# Runs launch/tpu_worker.sh with these arguments on every worker.
on_workers() {
  local words
  words=$(printf '%q ' "$@")
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --command="bash \$HOME/grape_jax/$name/code/launch/tpu_worker.sh ${words% }"
}

start() {
  make_slice
  local archive
  archive=$(mktemp -d)/code.tar.gz
  run tar -czf "$archive" -C "$root" --exclude=__pycache__ \
    grape_jax configs launch setup.py pyproject.toml LICENSE
  run gcloud compute tpus tpu-vm scp "$archive" "$name:grape_jax-$name.tar.gz" "${place[@]}" \
    --worker=all
  rm -rf "$(dirname "$archive")"
  local folder="\$HOME/grape_jax/$name/code"
  # The code of a running run must not be replaced: all workers stop before the copy, and none starts
  # before all have stopped.
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --command="if test -d $folder/launch; then bash $folder/launch/tpu_worker.sh stop $name; fi"
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
    --command="mkdir -p $folder && cd $folder && rm -rf grape_jax configs launch && tar -xzf \$HOME/grape_jax-$name.tar.gz"
  on_workers install "$name"
  on_workers start "$name" "$@"
  echo "$name runs. To see it: bash launch/tpu_pod.sh logs --name=$name --zone=$zone"
}

watch() {
  start "$@"
  while [[ -z $dry ]]; do
    sleep "$poll"
    case $(slice_state) in
      UNKNOWN) continue ;;
      READY) ;;
      *)
        echo "$(date '+%F %T') the slice is gone: it is created again, and the run resumes."
        start_again
        continue
        ;;
    esac
    if ! on_workers status "$name" >"$seen" || [[ ! -s $seen ]] || grep -qv ': ended ' "$seen"; then
      continue
    fi
    cat "$seen"
    if grep -q ': ended 0; stopped ' "$seen"; then
      echo "$(date '+%F %T') the run was interrupted: it is restarted."
      start_again
      continue
    fi
    echo "The run has ended; the slice is still there: delete it with this script."
    if grep -qvE ': ended (0|on request);' "$seen"; then exit 1; fi
    return
  done
}

# Runs in a subshell that stops at the first error: capacity for a slice may be missing for hours.
start_again() {
  until bash "${BASH_SOURCE[0]}" start "${given[@]}"; do
    echo "$(date '+%F %T') it could not be started: next attempt in $poll seconds."
    sleep "$poll"
  done
}

case $command in
  start | watch)
    check_start
    seen=$(mktemp)
    trap 'rm -f "$seen"' EXIT
    "$command" "$@"
    ;;
  logs)
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$worker" \
      --command="tail -n 100 -F \$HOME/grape_jax/$name/log"
    ;;
  status)
    echo "slice: $(slice_state)"
    on_workers status "$name"
    ;;
  stop) on_workers stop "$name" ;;
  delete) delete ;;
esac
