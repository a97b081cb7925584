# SPDX-License-Identifier: Apache-2.0
# Finds nvcc and the CUDA runtime that torch uses. Sets torch_cuda ("13.0", of torch),
# cuda_FOUND, cuda_version ("13.0", of nvcc), cuda_objects (the compiled kernels) and the
# target automoe_cuda; or says why there is no CUDA. The driver and NCCL are not linked:
# they are found at run time.
if(NOT AUTOMOE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "AUTOMOE_CUDA is '${AUTOMOE_CUDA}', expected AUTO, ON or OFF")
endif()

set(cuda_FOUND FALSE)
set(cuda_version "")
set(cuda_objects "")
set(cuda_lacks "")
set(torch_cuda "")
set(torch_version_file "${AUTOMOE_TORCH_ROOT}/version.py")
if(AUTOMOE_BUILD_TORCH AND EXISTS "${torch_version_file}")
  file(STRINGS "${torch_version_file}" torch_cuda REGEX "^cuda.*= '")
  string(REGEX REPLACE ".*'([^']+)'.*" "\\1" torch_cuda "${torch_cuda}")
endif()

# Sets cuda_root, cuda_version and cuda_major of nvcc, or cuda_lacks.
macro(find_nvcc packages)
  find_program(nvcc nvcc NO_CACHE HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin"
    PATHS /usr/local/cuda/bin ${packages}/cu13/bin)
  if(NOT nvcc)
    set(cuda_lacks "there is no nvcc; install the CUDA toolkit and set CUDA_HOME")
  else()
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_text)
    string(REGEX MATCH "release (([0-9]+)\\.[0-9]+)" _ "${nvcc_text}")
    set(cuda_version "${CMAKE_MATCH_1}")
    set(cuda_major "${CMAKE_MATCH_2}")
    # nvcc on PATH may be a link or a script: it says itself where its files are.
    file(WRITE "${CMAKE_BINARY_DIR}/cuda/empty.cu" "")
    execute_process(COMMAND "${nvcc}" --dryrun -c "${CMAKE_BINARY_DIR}/cuda/empty.cu"
      ERROR_VARIABLE nvcc_text)
    string(REGEX MATCH "TOP=([^\n]+)" _ "${nvcc_text}")
    get_filename_component(cuda_root "${CMAKE_MATCH_1}" ABSOLUTE)
  endif()
endmacro()

# Sets cuda_include and cuda_runtime, or cuda_lacks. The runtime of torch's wheels comes
# first, as it is what the process will have loaded.
macro(find_cuda_runtime packages)
  # What cuda_runtime_api.h includes: some wheels have that one alone.
  find_path(cuda_include crt/host_defines.h NO_DEFAULT_PATH NO_CACHE PATHS
    "${cuda_root}/targets/x86_64-linux/include" "${cuda_root}/include"
    "${packages}/cu${cuda_major}/include" "${packages}/cuda_runtime/include")
  find_file(cuda_runtime libcudart.so.${cuda_major} NO_DEFAULT_PATH NO_CACHE PATHS
    "${packages}/cu${cuda_major}/lib" "${packages}/cuda_runtime/lib"
    "${AUTOMOE_TORCH_ROOT}/lib" "${cuda_root}/lib64" "${cuda_root}/lib"
    "${cuda_root}/targets/x86_64-linux/lib")
  if(NOT cuda_include)
    set(cuda_lacks "${nvcc} comes without crt/host_defines.h; install the whole toolkit")
  elseif(NOT cuda_runtime)
    set(cuda_lacks "there is no libcudart.so.${cuda_major}; install the CUDA toolkit")
  endif()
endmacro()

# Sets cuda_objects: each kernel file for all of cuda_architectures.
macro(compile_cuda_kernels)
  set(cuda_flags -std=c++20 -O3 -DNDEBUG --fmad=false "-I${CMAKE_SOURCE_DIR}/csrc"
    -ccbin "${CMAKE_CXX_COMPILER}" "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
  if(AUTOMOE_WERROR)
    list(APPEND cuda_flags -Werror all-warnings)
  endif()
  foreach(architecture ${cuda_architectures})
    list(APPEND cuda_flags
      "-gencode=arch=compute_${architecture},code=sm_${architecture}")
  endforeach()
  # For GPUs to come: the driver compiles the last one's PTX.
  list(GET cuda_architectures -1 last)
  list(APPEND cuda_flags "-gencode=arch=compute_${last},code=compute_${last}")
  file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/kernels/*.cu)
  foreach(source ${cuda_kernels})
    get_filename_component(name "${source}" NAME_WE)
    set(object "${CMAKE_BINARY_DIR}/cuda/${name}.o")
    add_custom_command(OUTPUT "${object}"
      COMMAND "${nvcc}" ${cuda_flags} -MD -MF "${object}.d" -c "${source}" -o "${object}"
      DEPENDS "${source}" DEPFILE "${object}.d" VERBATIM COMMENT "nvcc ${name}.cu")
    list(APPEND cuda_objects "${object}")
  endforeach()
  set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
endmacro()

get_filename_component(packages "${AUTOMOE_TORCH_ROOT}" DIRECTORY)
string(APPEND packages "/nvidia")
if(AUTOMOE_CUDA STREQUAL "OFF")
  set(cuda_lacks "AUTOMOE_CUDA is OFF")
elseif(AUTOMOE_BUILD_TORCH AND NOT torch_cuda)
  set(cuda_lacks "torch is a CPU build; install one for CUDA from PyPI")
elseif(NOT AUTOMOE_BUILD_TORCH AND AUTOMOE_CUDA STREQUAL "AUTO")
  set(cuda_lacks "the core alone is built; AUTOMOE_CUDA=ON builds it with CUDA")
else()
  find_nvcc("${packages}")
  if(NOT cuda_lacks AND torch_cuda AND NOT torch_cuda MATCHES "^${cuda_major}\\.")
    set(cuda_lacks "torch is built for CUDA ${torch_cuda}, but ${nvcc} is of "
      "${cuda_version}; set CUDA_HOME to a toolkit of the same major version")
    string(CONCAT cuda_lacks ${cuda_lacks})
  endif()
  if(NOT cuda_lacks)
    find_cuda_runtime("${packages}")
  endif()
endif()

if(NOT cuda_lacks)
  set(cuda_FOUND TRUE)
  set(cuda_architectures "${AUTOMOE_CUDA_ARCHITECTURES}")
  if(NOT cuda_architectures)
    set(cuda_architectures 80 90)
    if(cuda_version VERSION_GREATER_EQUAL 12.8)
      list(APPEND cuda_architectures 100)
    endif()
  endif()
  compile_cuda_kernels()
  add_library(automoe_cuda INTERFACE)
  target_include_directories(automoe_cuda SYSTEM INTERFACE "${cuda_include}")
  target_compile_definitions(automoe_cuda INTERFACE AUTOMOE_CUDA)
  target_link_libraries(automoe_cuda INTERFACE "${cuda_runtime}")
  message(STATUS "CUDA ${cuda_version} for ${cuda_architectures}: ${nvcc}, ${cuda_runtime}")
elseif(AUTOMOE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "AUTOMOE_CUDA is ON, but ${cuda_lacks}")
else()
  set(cuda_version "")
  message(STATUS "CUDA: no (${cuda_lacks})")
endif()
