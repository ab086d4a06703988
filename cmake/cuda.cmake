# The CUDA half of _C, where PACI_RT_CUDA and the toolkit allow it. CMake's CUDA language is not enabled: one small file
# of device code does not need it, and where its trial compilation fails, `auto` could not go on without.

set(PACI_RT_CUDA_ARCHS "80;90;100;120" CACHE STRING "Compute capabilities to compile device code for, without the dot")
set(paci_rt_no_cuda "")

if(PACI_RT_CUDA STREQUAL "off")
  set(paci_rt_no_cuda "PACI_RT_CUDA=off")
else()
  find_package(CUDAToolkit 12.0 QUIET)
  if(NOT CUDAToolkit_FOUND)
    set(paci_rt_no_cuda "no CUDA toolkit from version 12.0 was found")
  elseif(NOT TARGET CUDA::cudart_static)
    set(paci_rt_no_cuda "the CUDA toolkit that was found has no libcudart_static.a")
  elseif(NOT EXISTS "${CUDAToolkit_INCLUDE_DIRS}/cuda.h" AND NOT EXISTS "${CUDAToolkit_TARGET_DIR}/include/cuda.h")
    set(paci_rt_no_cuda "the CUDA toolkit that was found has no cuda.h")
  endif()
endif()

if(paci_rt_no_cuda)
  if(PACI_RT_CUDA STREQUAL "on")
    message(FATAL_ERROR "PACI_RT_CUDA=on: ${paci_rt_no_cuda}; install the toolkit (nvcc, the runtime's headers and its "
      "static library), put nvcc on PATH or set CUDAToolkit_ROOT to its folder, or build with PACI_RT_CUDA=auto or off")
  endif()
  message(STATUS "paci_rt: without the CUDA half (${paci_rt_no_cuda})")
  target_sources(_C PRIVATE csrc/cuda/stub_cuda.cpp)
  set_source_files_properties(csrc/cuda/stub_cuda.cpp PROPERTIES COMPILE_DEFINITIONS "PACI_RT_NO_CUDA=\"${paci_rt_no_cuda}\"")
  return()
endif()

target_sources(_C PRIVATE csrc/cuda/cuda_check.cpp csrc/cuda/cuda_ops.cpp csrc/cuda/sm_partition.cpp)
target_include_directories(_C SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
# Static, so that the module loads, and says that there is no device, where no CUDA library is installed.
target_link_libraries(_C PRIVATE CUDA::cudart_static)

# An nvcc that refuses the C++ compiler here must not take the CPU half down with it: the device code is a few small
# kernels for tests and measurements.
set(paci_rt_no_nvcc "")
if(NOT CUDAToolkit_NVCC_EXECUTABLE)
  set(paci_rt_no_nvcc "there is no nvcc")
elseif(NOT PACI_RT_NVCC_WORKS STREQUAL CUDAToolkit_NVCC_EXECUTABLE)
  set(paci_rt_try ${CMAKE_CURRENT_BINARY_DIR}/try_nvcc)
  file(WRITE ${paci_rt_try}.cu "#include <vector>\n__global__ void kernel() {}\n")
  execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -std=c++17 -c -o ${paci_rt_try}.o ${paci_rt_try}.cu
    RESULT_VARIABLE paci_rt_result OUTPUT_VARIABLE paci_rt_said ERROR_VARIABLE paci_rt_said)
  if(paci_rt_result EQUAL 0)
    set(PACI_RT_NVCC_WORKS ${CUDAToolkit_NVCC_EXECUTABLE} CACHE INTERNAL "The nvcc that compiled a small file")
  else()
    set(paci_rt_no_nvcc "nvcc compiles nothing here:\n${paci_rt_said}\nNVCC_CCBIN names another C++ compiler to it")
  endif()
endif()
if(paci_rt_no_nvcc)
  if(PACI_RT_CUDA STREQUAL "on")
    message(FATAL_ERROR "PACI_RT_CUDA=on: ${paci_rt_no_nvcc}; PACI_RT_CUDA=auto builds without device code")
  endif()
  message(STATUS "paci_rt: with the CUDA half (${CUDAToolkit_VERSION}), without device code: ${paci_rt_no_nvcc}")
  target_sources(_C PRIVATE csrc/cuda/stub_test_kernels.cpp)
  return()
endif()

# What this nvcc knows of the wanted ones: an older one has no Blackwell, a newer one may have dropped Ampere.
execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} --list-gpu-code OUTPUT_VARIABLE paci_rt_known)
set(paci_rt_archs "")
set(paci_rt_gencode "")
foreach(arch IN LISTS PACI_RT_CUDA_ARCHS)
  if(paci_rt_known MATCHES "sm_${arch}[^0-9a-z]")
    list(APPEND paci_rt_archs ${arch})
    list(APPEND paci_rt_gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
    set(paci_rt_newest ${arch})
  endif()
endforeach()
if(NOT paci_rt_archs)
  message(FATAL_ERROR "nvcc ${CUDAToolkit_VERSION} compiles for none of PACI_RT_CUDA_ARCHS=${PACI_RT_CUDA_ARCHS}; "
    "it knows ${paci_rt_known}")
endif()
# GPUs that come later compile this on first use.
list(APPEND paci_rt_gencode "-gencode=arch=compute_${paci_rt_newest},code=compute_${paci_rt_newest}")
string(REPLACE ";" "," paci_rt_arch_list "${paci_rt_archs}")
set(paci_rt_test_kernels ${CMAKE_CURRENT_BINARY_DIR}/test_kernels.cu.o)
add_custom_command(
  OUTPUT ${paci_rt_test_kernels}
  COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -c -O2 -std=c++17 --threads=1
    -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
    ${paci_rt_gencode} -Xcompiler=-fPIC,-fvisibility=hidden -o ${paci_rt_test_kernels}
    ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/test_kernels.cu
  DEPENDS csrc/cuda/test_kernels.cu csrc/cuda/test_kernels.hpp
  COMMENT "Building device code for sm_${paci_rt_arch_list}"
  VERBATIM)
target_sources(_C PRIVATE ${paci_rt_test_kernels})
set_source_files_properties(csrc/cuda/cuda_ops.cpp PROPERTIES COMPILE_DEFINITIONS "PACI_RT_CUDA_ARCHS=${paci_rt_arch_list}")
set_source_files_properties(${paci_rt_test_kernels} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
message(STATUS "paci_rt: with the CUDA half (${CUDAToolkit_VERSION}), device code for sm_${paci_rt_arch_list}")
