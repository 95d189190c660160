# csrc/cuda, compiled by nvcc where torch has CUDA of the release TORCH_CUDA; else the reason why it is not.
# nvcc is called by hand: that of the pip packages is not laid out as CMake's own support for CUDA expects.
set(CUDA_OBJECTS)
set(CUDA_RUNTIME)
set(CUDA_ARCHITECTURES)
set(WHY_NO_CUDA)

if(NOT TORCH_CUDA)
  set(WHY_NO_CUDA "this torch has no CUDA")
  return()
endif()
file(STRINGS ${TORCH_DIR}/include/c10/core/Stream.h NATIVE_HANDLE REGEX " native_handle\\(")
if(NOT NATIVE_HANDLE)
  set(WHY_NO_CUDA "torch gives the handle of a stream from 2.11 on")
  return()
endif()
file(GLOB CUDA_PACKAGES ${TORCH_DIR}/../nvidia/cu*/bin)
find_program(NVCC nvcc PATHS $ENV{CUDA_HOME} /usr/local/cuda ${CUDA_PACKAGES} PATH_SUFFIXES bin)
if(NOT NVCC)
  set(WHY_NO_CUDA "no nvcc was found when the extension was built")
  return()
endif()

# The runtime that is linked in must be of the release of torch's: a driver may have been left at that.
execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE NVCC_SAYS COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" NVCC_RELEASE "${NVCC_SAYS}")
if(NOT TORCH_CUDA MATCHES "^${CMAKE_MATCH_1}\\.")
  set(WHY_NO_CUDA "nvcc is of ${NVCC_RELEASE}, torch has CUDA ${TORCH_CUDA}")
  return()
endif()
execute_process(COMMAND ${NVCC} --dryrun none.cu ERROR_VARIABLE NVCC_SAYS OUTPUT_QUIET)
string(REGEX MATCH "TOP=([^\n]+)" TOOLKIT "${NVCC_SAYS}")
set(TOOLKIT ${CMAKE_MATCH_1})
file(GLOB TOOLKIT_LIBRARIES ${TOOLKIT}/lib64 ${TOOLKIT}/lib ${TOOLKIT}/targets/*/lib)
find_library(CUDART cudart_static PATHS ${TOOLKIT_LIBRARIES} NO_DEFAULT_PATH)
if(NOT CUDART)
  set(WHY_NO_CUDA "${TOOLKIT} has no libcudart_static.a")
  return()
endif()
set(CUDA_RUNTIME ${CUDART} dl rt pthread)

# Machine code for every generation that nvcc knows, and PTX of the newest for those to come.
execute_process(COMMAND ${NVCC} --list-gpu-code OUTPUT_VARIABLE NVCC_SAYS COMMAND_ERROR_IS_FATAL ANY)
foreach(arch 75 80 90 100 120)
  if(NVCC_SAYS MATCHES "sm_${arch}\n")
    list(APPEND CUDA_ARCHITECTURES sm_${arch})
    list(APPEND CUDA_CODE -gencode arch=compute_${arch},code=sm_${arch})
    set(CUDA_PTX -gencode arch=compute_${arch},code=compute_${arch})
  endif()
endforeach()
string(REPLACE ";" ", " CUDA_ARCHITECTURES "${CUDA_ARCHITECTURES}")

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
foreach(source ${CUDA_SOURCES})
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.cu.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${NVCC} -c ${source} -o ${object} -O3 -std=c++20 -I${CMAKE_CURRENT_SOURCE_DIR}/csrc/include ${CUDA_CODE} ${CUDA_PTX}
      -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler -fPIC,-fvisibility=hidden -MD -MF ${object}.d
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "Compiling ${name}.cu for ${CUDA_ARCHITECTURES}"
    VERBATIM)
  list(APPEND CUDA_OBJECTS ${object})
endforeach()
