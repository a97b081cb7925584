#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles everything that a build for GPUs adds to a build without: the kernels by nvcc
# for each architecture, and the C++ files over the CUDA runtime. Needs no GPU.
#
# tools/compile_cuda.sh OUT [TORCH_ROOT]
#
# Objects go to OUT. TORCH_ROOT is the folder of a torch package that is built for CUDA:
# the headers of its environment serve where the toolkit has none. Without nvcc, nothing
# is compiled, which is an error where AUTOMOE_NEED_NVCC is set.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: ${0##*/} OUT [TORCH_ROOT]" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd)
torch_root=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."

PATH="$PATH${CUDA_HOME:+:$CUDA_HOME/bin}:/usr/local/cuda/bin"
if ! command -v nvcc >/dev/null; then
  echo "not compiled: no nvcc (install the CUDA toolkit, or set CUDA_HOME)"
  [ -z "${AUTOMOE_NEED_NVCC:-}" ]
  exit
fi
version=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
major=${version%%.*}
echo "nvcc $version: $(command -v nvcc)"

# nvcc on PATH may be a link or a script: it says itself where its files are.
: >"$out/empty.cu"
toolkit=$(nvcc --dryrun -c "$out/empty.cu" 2>&1 | sed -n 's/^#\$ TOP=//p')
include=
for folder in "$toolkit/targets/x86_64-linux/include" "$toolkit/include" \
  ${torch_root:+"$torch_root/../nvidia/cu$major/include" \
  "$torch_root/../nvidia/cuda_runtime/include"}; do
  # The wheels of some packages have the first file without the second.
  if [ -z "$include" ] && [ -e "$folder/cuda_runtime_api.h" ] &&
    [ -e "$folder/crt/host_defines.h" ]; then
    include=$folder
  fi
done
if [ -z "$include" ]; then
  echo "there is no cuda_runtime_api.h under $toolkit; install the whole toolkit" >&2
  exit 1
fi

architectures=(80 90)
# 100 came with 12.8.
if [ "$(printf '%s\n' 12.8 "$version" | sort -V | head -n 1)" = 12.8 ]; then
  architectures+=(100)
fi
codes=()
for architecture in "${architectures[@]}"; do
  codes+=("-gencode=arch=compute_$architecture,code=sm_$architecture")
done
codes+=("-gencode=arch=compute_$architecture,code=compute_$architecture")

echo "kernels for sm_${architectures[*]} and PTX"
for source in csrc/kernels/*.cu; do
  echo "  nvcc $source"
  nvcc -std=c++20 -O3 --fmad=false -Icsrc -Xcompiler=-fPIC,-Wall,-Wextra \
    -Werror all-warnings "${codes[@]}" -c "$source" -o "$out/$(basename "$source").o"
done

echo "C++ over the CUDA runtime of $include"
for source in csrc/process_group/device/*.cpp; do
  case $source in */without_cuda.cpp) continue ;; esac
  echo "  ${CXX:-g++} $source"
  ${CXX:-g++} -std=c++20 -O2 -fPIC -Wall -Wextra -Wconversion -Werror -DAUTOMOE_CUDA \
    -Icsrc -isystem "$include" -c "$source" -o "$out/$(basename "$source").o"
done
echo "compiled: $(find "$out" -name '*.o' | wc -l) objects"
