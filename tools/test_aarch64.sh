#!/usr/bin/env bash
# The tests of the ops on AArch64, on a machine of another kind: Python and torch for AArch64 under qemu-user, our
# library built by setup.py with a cross compiler. On Debian 12, with g++-aarch64-linux-gnu and qemu-user; takes what
# it needs from Debian's and Python's package registries. About 800 MB in build/aarch64.
#
#   tools/test_aarch64.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
mkdir -p build/aarch64
cd build/aarch64
here=$PWD

python() { PYTHONPATH=$here/site qemu-aarch64 -L "$here/root" "$here/root/usr/bin/python3" "$@"; }

if [ ! -d root ]; then
  mkdir -p apt/lists/partial apt/archives/partial
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::Lists="$here/apt/lists"
    -o Dir::State::status=/dev/null -o Dir::Cache="$here/apt" -o Debug::NoLocking=1)
  "${apt[@]}" update
  "${apt[@]}" install --download-only --no-install-recommends -y python3-dev libgomp1 libstdc++6
  for package in apt/archives/*.deb; do dpkg -x "$package" root; done
fi

# torch 2.10: the last one whose wheel for AArch64 wants no CUDA.
if [ ! -d site ]; then
  python3 -m pip install -q --target site --only-binary=:all: --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    'torch==2.10.*' 'numpy<2.4' pillow safetensors tqdm 'setuptools>=77,<82' pybind11 pytest expecttest
fi

# A copy: objects of both architectures would have the same names.
mkdir -p tree
git -C "$repository" ls-files -z | tar -C "$repository" --null -T - -c | tar -x -C tree
cd tree
MNIST_EXT_CUDA=0 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ python setup.py -q build_ext --inplace egg_info
python -m pytest -p no:cacheprovider -k "not emulated" "$@"
