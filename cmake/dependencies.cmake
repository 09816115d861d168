# Third-party libraries besides torch: the system's package first, a pinned release second. Each is made available
# by the folder that uses it: FetchContent_MakeAvailable(highway | googletest | benchmark). Targets: hwy::hwy,
# GTest::gtest_main, benchmark::benchmark_main. pybind11 is missing on purpose: python/ takes the headers inside
# torch, which fit that torch and its Python.
include(FetchContent)

# The fetched projects' option() and set(... CACHE) honour the variables set here.
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
set(CMAKE_POLICY_DEFAULT_CMP0126 NEW)

# Fetched: a static library that stays hidden inside libnormcore.
set(HWY_ENABLE_CONTRIB OFF)
set(HWY_ENABLE_EXAMPLES OFF)
set(HWY_ENABLE_INSTALL OFF)
set(HWY_ENABLE_TESTS OFF)
set(HWY_FORCE_STATIC_LIBS ON)
FetchContent_Declare(
  highway
  GIT_REPOSITORY https://github.com/google/highway.git
  GIT_TAG 1.2.0
  GIT_SHALLOW ON
  FIND_PACKAGE_ARGS 1.0.3 CONFIG GLOBAL NAMES hwy)

set(INSTALL_GTEST OFF)
FetchContent_Declare(
  googletest
  GIT_REPOSITORY https://github.com/google/googletest.git
  GIT_TAG v1.17.0
  GIT_SHALLOW ON
  FIND_PACKAGE_ARGS 1.12 CONFIG NAMES GTest)

set(BENCHMARK_ENABLE_INSTALL OFF)
set(BENCHMARK_ENABLE_TESTING OFF)
FetchContent_Declare(
  benchmark
  GIT_REPOSITORY https://github.com/google/benchmark.git
  GIT_TAG v1.9.5
  GIT_SHALLOW ON
  FIND_PACKAGE_ARGS 1.7 CONFIG NAMES benchmark)
