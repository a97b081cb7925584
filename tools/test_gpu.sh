#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds in place with the torch of this machine, and runs what needs a GPU: tests/gpu,
# then compute-sanitizer on the kernels. Needs no network. `make test-gpu` calls it.
#
# Environment: PYTHON (python3), whose torch it is; GPU_TEST_SECONDS (480), the limit of
# everything; GPU_TEST_BUILD=0 takes the package as it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
limit=${GPU_TEST_SECONDS:-480}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
not_run=()
failed=()

step() { printf '\n=== %s  [%d s]\n' "$*" "$SECONDS"; }

# limited MOST COMMAND...: ends the command after so many seconds, or at the limit of all.
limited() {
  local left=$((limit - SECONDS)) most=$1
  shift
  [ "$left" -gt 0 ] || return 124
  timeout -k 10 $((left < most ? left : most)) "$@"
}

# Says why there is no GPU to test with, and fails, or names torch and the GPUs.
look_for_device() {
  "$python" - <<'END'
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"there is no CUDA device: {sys.executable} has no torch ({error})")
if torch.version.cuda is None:
    sys.exit(f"there is no CUDA device: torch {torch.__version__} is a CPU build")
if not torch.cuda.is_available():
    sys.exit("there is no CUDA device: torch finds no GPU or no driver")
minor = tuple(map(int, torch.__version__.split(".")[:2]))
if minor < (2, 11):
    sys.exit(f"torch is {torch.__version__}, expected 2.11 or newer")
nccl = ".".join(map(str, torch.cuda.nccl.version()))
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}")
END
}

build() {
  PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
  if ! command -v nvcc >/dev/null; then
    echo "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME" >&2
    return 1
  fi
  # Without isolation, what builds is what is installed. 77 reads the license of ours.
  "$python" - <<'END' || return 1
import sys
from importlib.metadata import PackageNotFoundError, version
for name in ("pip", "setuptools"):
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit(f"there is no {name}, by which the package is built: install it")
    if name == "setuptools" and int(found.split(".")[0]) < 77:
        sys.exit(f"setuptools is {found}, expected 77 or newer: upgrade it")
END
  # For this GPU alone, and whatever an unknown compiler warns of.
  local architecture args
  architecture=$("$python" -c 'import torch
print("%d%d" % torch.cuda.get_device_capability())') || return 1
  args="-DAUTOMOE_CUDA=ON -DAUTOMOE_CUDA_ARCHITECTURES=$architecture"
  limited "$limit" env CMAKE_ARGS="${CMAKE_ARGS:-} $args -DAUTOMOE_WERROR=OFF" \
    "$python" -m pip install -q --disable-pip-version-check --no-build-isolation \
    --no-deps -e .
}

run_tests() {
  local status=0 most=$((limit - SECONDS - 120))
  limited $((most > 60 ? most : 60)) "$python" -m pytest tests/gpu \
    -p no:cacheprovider -o faulthandler_timeout=150 2>&1 |
    tee "$scratch/tests" || status=$?
  # SKIPPED [2] tests/gpu/test_gpu_paths.py:31: needs NCCL >= 2.30 ...
  while IFS= read -r line; do
    not_run+=("tests/gpu: $line")
  done < <(sed -n 's/^SKIPPED \[[0-9]*\] [^ ]*: //p' "$scratch/tests" | sort -u)
  [ "$status" = 0 ] || failed+=("tests/gpu (exit status $status)")
}

# A program of one process that runs every kernel once, under each checker.
run_sanitizer() {
  local tool status options
  PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
  for tool in memcheck racecheck; do
    if ! command -v compute-sanitizer >/dev/null; then
      not_run+=("$tool: needs compute-sanitizer of the CUDA toolkit")
      continue
    fi
    step "compute-sanitizer, $tool"
    status=0
    # Torch asks CUDA for things that it may refuse; hazards are told by kernels' names.
    options=(--report-api-errors no)
    [ "$tool" = memcheck ] || options=(--show-backtrace no)
    # Without the caching allocator every tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 120 compute-sanitizer --tool "$tool" \
      "${options[@]}" --error-exitcode 9 "$python" tests/gpu/kernels_program.py \
      >"$scratch/$tool" 2>&1 || status=$?
    tail -n 40 "$scratch/$tool"
    if [ "$status" = 124 ]; then
      not_run+=("$tool: needs more time than it had")
    elif grep -qi "device not supported" "$scratch/$tool"; then
      not_run+=("$tool: needs a machine on which compute-sanitizer can see the GPU")
    elif [ "$tool $status" = "racecheck 9" ] && ! grep -q automoe:: "$scratch/$tool"; then
      echo "these hazards are of kernels that are not ours"
    elif [ "$status" != 0 ]; then
      failed+=("$tool (exit status $status)")
    fi
  done
}

if ! found=$(look_for_device 2>&1); then
  # One line, with nothing that a library may have printed before it.
  tail -n 1 <<<"$found" >&2
  exit 1
fi

if [ "${GPU_TEST_BUILD:-1}" != 0 ]; then
  step "building"
  status=0
  build || status=$?
  case $status in
    0) ;;
    124 | 137)
      echo "FAILED: the build, ended at the limit of $limit s (GPU_TEST_SECONDS)"
      exit 1 ;;
    *)
      echo "FAILED: the build (exit status $status)"
      exit 1 ;;
  esac
fi

step "what is here"
echo "$found"
nvidia-smi -L || not_run+=("the list of GPUs: needs nvidia-smi")
limited 60 "$python" -m torch_automoe.info || failed+=("automoe info")
limited 60 "$python" -c 'import torch_automoe; print(torch_automoe.explain_topology())' ||
  failed+=("explain_topology")

step "tests/gpu"
run_tests
run_sanitizer

step "end"
for line in "${not_run[@]}"; do
  echo "not run: $line"
done
for line in "${failed[@]}"; do
  echo "FAILED: $line"
done
[ "${#failed[@]}" = 0 ]
