# A toolchain file for ThreadSanitizer: clang where it and its runtime are installed, since that of GCC 12 is slower.
if(NOT CMAKE_CXX_COMPILER AND NOT DEFINED ENV{CXX})
  find_program(normcore_CLANG clang++)
  if(normcore_CLANG)
    set(normcore_PROGRAM "${CMAKE_BINARY_DIR}/CMakeFiles/prefer_clang.cpp")
    file(WRITE "${normcore_PROGRAM}" "int main() {}\n")
    execute_process(
      COMMAND "${normcore_CLANG}" -fsanitize=thread "${normcore_PROGRAM}" -o "${normcore_PROGRAM}.out"
      RESULT_VARIABLE normcore_CLANG_FAILS
      OUTPUT_QUIET ERROR_QUIET)
    if(normcore_CLANG_FAILS EQUAL 0)
      set(CMAKE_CXX_COMPILER "${normcore_CLANG}")
    endif()
  endif()
endif()
