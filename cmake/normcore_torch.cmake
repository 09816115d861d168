# Target normcore::torch: headers and libraries of libtorch's CPU side, without Python. Used by the build and, installed
# beside normcoreConfig.cmake, by every project that links normcore. Sets normcore_torch_VERSION (such as 2.15.0) and
# normcore_torch_ROOT. A project that already found Torch keeps that one; otherwise torch is looked for in TORCH_ROOT
# (a folder with include/ and lib/: LibTorch, or the torch Python package), in normcore_torch_HINT, in CMAKE_PREFIX_PATH.
# The libraries are imported by hand, since find_package(Torch) of a CUDA build fails where no CUDA toolkit is installed.
if(TARGET torch AND TORCH_INSTALL_PREFIX)
  set(normcore_torch_ROOT "${TORCH_INSTALL_PREFIX}")
elseif(TORCH_ROOT)
  set(normcore_torch_ROOT "${TORCH_ROOT}")
elseif(normcore_torch_HINT AND EXISTS "${normcore_torch_HINT}/lib/libtorch_cpu.so")
  set(normcore_torch_ROOT "${normcore_torch_HINT}")
else()
  find_path(normcore_torch_CONFIG_DIR TorchConfig.cmake PATH_SUFFIXES share/cmake/Torch Torch)
  cmake_path(SET normcore_torch_ROOT NORMALIZE "${normcore_torch_CONFIG_DIR}/../../..")
endif()

set(_normcore_version_header "${normcore_torch_ROOT}/include/torch/headeronly/version.h")
if(NOT EXISTS "${_normcore_version_header}")
  message(FATAL_ERROR "normcore: no torch in '${normcore_torch_ROOT}'. Set TORCH_ROOT to LibTorch's folder or to the "
                      "folder of the torch Python package, or add LibTorch to CMAKE_PREFIX_PATH.")
endif()
file(STRINGS "${_normcore_version_header}" _normcore_version_lines
     REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
string(REGEX REPLACE "[^0-9;]" "" normcore_torch_VERSION "${_normcore_version_lines}")
string(REPLACE ";" "." normcore_torch_VERSION "${normcore_torch_VERSION}")

if(NOT TARGET normcore::torch)
  add_library(normcore::torch INTERFACE IMPORTED GLOBAL)
  if(TARGET torch)
    target_link_libraries(normcore::torch INTERFACE torch)
  else()
    target_include_directories(
      normcore::torch SYSTEM INTERFACE "${normcore_torch_ROOT}/include"
                                       "${normcore_torch_ROOT}/include/torch/csrc/api/include")
    foreach(_normcore_library IN ITEMS torch torch_cpu c10)
      add_library(normcore::torch_${_normcore_library} SHARED IMPORTED GLOBAL)
      set_target_properties(normcore::torch_${_normcore_library} PROPERTIES
        IMPORTED_LOCATION "${normcore_torch_ROOT}/lib/lib${_normcore_library}.so")
      target_link_libraries(normcore::torch INTERFACE normcore::torch_${_normcore_library})
    endforeach()
  endif()
  target_compile_features(normcore::torch INTERFACE cxx_std_20)
  # libtorch_cuda.so of some releases refers to symbols that its own dependencies bring at run time only.
  target_link_options(normcore::torch INTERFACE LINKER:--allow-shlib-undefined)
endif()
