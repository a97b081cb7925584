#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares a machine for the Makefile:  prepare.sh venv FOLDER | gtest | ip
#   venv   a virtual environment with torch, UCX and the build tools
#   gtest  GoogleTest, for the C++ tests
#   ip     iproute2, with which the laboratory makes its networks
# A system package that is missing is installed by apt-get where we are root; elsewhere
# one line says what to install. Environment: PYTHON, and TORCH (a version to install).
set -euo pipefail

python=${PYTHON:-python3}
default_torch=2.13.0

say() { echo "== $*" >&2; }

# install_or_say PACKAGE REASON: succeeds only when the package is now installed.
install_or_say() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $1 ($2)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$1" >/dev/null 2>&1 ||
      { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$1"; } >&2
  else
    say "$2: install the package '$1' (Debian: sudo apt-get install $1)"
    return 1
  fi
}

# Prints yes where $python has a torch that this package can be built against.
has_supported_torch() {
  "$python" - <<'EOF'
from importlib.metadata import PackageNotFoundError, version
try:
    major, minor = map(int, version("torch").split(".")[:2])
except PackageNotFoundError:
    major, minor = 0, 0
print("yes" if major == 2 and 11 <= minor <= 14 else "no")
EOF
}

has_cmake() {
  command -v cmake >/dev/null &&
    cmake --version | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[2] >= 22) }'
}

check_toolchain() {
  command -v "$python" >/dev/null || install_or_say python3 "no $python on the PATH"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    say "$("$python" --version) is too old: Python 3.10 or newer is needed (PYTHON=...)"
    return 1
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    install_or_say python3-venv "$python cannot make virtual environments"
  "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    install_or_say python3-dev "the headers of $python are missing"
  command -v "${CXX:-c++}" >/dev/null || install_or_say g++ "there is no C++ compiler"
}

# see_packages_of_venv FOLDER: where $python is that of a virtual environment, FOLDER
# has not got its packages by --system-site-packages, but those of the Python below it.
see_packages_of_venv() {
  "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' || return 0
  local own
  own=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$own/packages_of_python.pth"
}

make_venv() {
  local folder=$1 pip="$1/bin/python -m pip install -q --disable-pip-version-check"
  check_toolchain
  if [ -z "${TORCH:-}" ] && [ "$(has_supported_torch)" = yes ]; then
    say "making $folder with the torch of $python"
    "$python" -m venv --system-site-packages "$folder"
    see_packages_of_venv "$folder"
  else
    say "making $folder with torch ${TORCH:-$default_torch}"
    "$python" -m venv "$folder"
    $pip "torch==${TORCH:-$default_torch}"
  fi
  $pip "setuptools>=77" wheel ninja "libucx-cu13>=1.18"
  has_cmake || $pip "cmake>=3.22"
}

case "${1:-}" in
  venv)
    make_venv "${2:?prepare.sh venv FOLDER}"
    ;;
  gtest)
    # Whoever sets a prefix has GoogleTest there; CMake says so if not.
    if [ -z "${CMAKE_PREFIX_PATH:-}${GTest_ROOT:-}" ]; then
      [ -e /usr/include/gtest/gtest.h ] || [ -e /usr/local/include/gtest/gtest.h ] ||
        install_or_say libgtest-dev "the C++ tests need GoogleTest"
    fi
    ;;
  ip)
    # Without it there are no emulated nodes, but everything else works.
    PATH="$PATH:/usr/sbin:/sbin" command -v ip >/dev/null ||
      install_or_say iproute2 "emulated nodes need the command 'ip'" || true
    ;;
  *)
    echo "usage: prepare.sh venv FOLDER | gtest | ip" >&2
    exit 2
    ;;
esac
