#!/usr/bin/env bash
# Collects what building and testing on a machine without network needs beside torch, in build/dependencies (below
# 12 MB): the sources of Highway and GoogleTest at the versions of cmake/dependencies.cmake, and Python packages that
# the tests import. Copy the folder with the source tree; benchmarks/gpu.sh finds it.
#   benchmarks/pack_dependencies.sh [FOLDER]
# HIGHWAY_REPOSITORY and GOOGLETEST_REPOSITORY name other git repositories (URLs or folders) to take the sources from.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/dependencies}

# value_of DEPENDENCY KEY: from the FetchContent_Declare of cmake/dependencies.cmake.
value_of() {
  sed -n "/^  $1\$/,/)\$/p" cmake/dependencies.cmake | sed -n "s/^  $2 //p"
}

# pack DEPENDENCY REPOSITORY PATH...: those paths of the tag that the build fetches.
pack() {
  local name=$1 repository=${2:-$(value_of "$1" GIT_REPOSITORY)} tag
  tag=$(value_of "$name" GIT_TAG)
  shift 2
  mkdir -p "$folder/$name"
  rm -rf "$folder/$name.git"
  git init --quiet --bare "$folder/$name.git"
  git -C "$folder/$name.git" fetch --quiet --depth 1 "$repository" "refs/tags/$tag"
  git -C "$folder/$name.git" archive FETCH_HEAD -- "$@" | tar -x -C "$folder/$name"
  rm -rf "$folder/$name.git"
  echo "$name $tag"
}

rm -rf "$folder"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
pack highway "${HIGHWAY_REPOSITORY:-}" CMakeLists.txt LICENSE LICENSE-BSD3 cmake hwy \
  libhwy.pc.in libhwy-contrib.pc.in libhwy-test.pc.in
pack googletest "${GOOGLETEST_REPOSITORY:-}" CMakeLists.txt LICENSE googletest googlemock
rm -rf "$folder"/googletest/google{test,mock}/{docs,samples,test}
# torch.library.opcheck imports it; torch does not bring it along.
python3 -m pip install --quiet --no-deps --no-compile --target "$folder/python" expecttest
du -sh "$folder"
