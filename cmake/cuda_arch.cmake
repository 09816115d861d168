# Option NORMCORE_CUDA: on if there is a CUDA compiler. Enables the language with C++20 (which CMake 3.25 does not know
# nvcc to support) and sets the architectures: those of NVIDIA's data centre devices that the toolkit knows, and the
# newest one's PTX for everything that comes later. CMAKE_CUDA_ARCHITECTURES overrides them.
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(normcore_CUDA_DEFAULT ON)
else()
  set(normcore_CUDA_DEFAULT OFF)
endif()
option(NORMCORE_CUDA "Build the CUDA kernels" ${normcore_CUDA_DEFAULT})

if(NORMCORE_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "CUDA architectures")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit 12.6 REQUIRED)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
endif()
