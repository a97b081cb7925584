#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests for GPUs where there is none: libraries of the tests take the places of
# CUDA's and NCCL's. Streams are threads, memory is the host's, and our kernels run by
# their emulation; what torch's own would do is done on the CPU. So the package, as it is
# built for GPUs, runs with its torch; tests that need more than that say so. `make
# test-without-gpu` calls it.
#
# tools/test_without_gpu.sh [PYTEST_ARGUMENT...]
#
# Environment: PYTHON (python3), which has torch for CUDA, this package as installed for
# it, pytest and numpy; WORK, a folder to build in (build/cuda_library). Exit status 77: PYTHON
# has no such torch or package.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "${PYTHON:-python3}")
work=${WORK:-build/cuda_library}
PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
mkdir -p "$work"
work=$(cd "$work" && pwd)

# Not from here: the folder of the package has what was built in place, for another torch.
lacks=$(cd "$work" && "$python" - <<'END'
import importlib.util as it
import torch
if torch.version.cuda is None:
    print(f"torch {torch.__version__} is a CPU build")
elif it.find_spec("torch_automoe") is None:
    print("torch_automoe is not installed")
else:
    from torch_automoe import _loader
    if not _loader.build_record().CUDA:
        print("torch_automoe was built without CUDA")
END
)
if [ -n "$lacks" ]; then
  echo "not run: $lacks ($python)"
  exit 77
fi

tools/prepare.sh gtest
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cmake -S . -B "$work" -G Ninja -DPython_EXECUTABLE="$python" -DAUTOMOE_CUDA=ON \
  -DAUTOMOE_BUILD_TORCH=OFF -DAUTOMOE_TORCH_ROOT="$site/torch" \
  -DAUTOMOE_BUILD_TESTS=ON >"$work/cmake.log" || {
  tail -n 5 "$work/cmake.log"
  exit 1
}
cmake --build "$work" --target automoe_cuda_library automoe_nccl_library

# Torch loads the driver by this name; it gets the same library.
mkdir -p "$work/driver"
ln -sf ../libcuda_of_tests.so "$work/driver/libcuda.so.1"
rm -rf "$work/run"
mkdir "$work/run"
cp -r tests pyproject.toml "$work/run"
cd "$work/run"
env LD_PRELOAD="$work/libcuda_of_tests.so $work/libnccl_of_tests.so" \
  LD_LIBRARY_PATH="$work/driver" \
  AUTOMOE_TEST_GPUS=1 "$python" -m pytest tests/gpu -p no:cacheprovider "$@"
