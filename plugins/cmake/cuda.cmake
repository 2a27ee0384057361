# CUDA's compiler and TensorRT's headers: this machine's, else those that fetch_cuda.py has put into build/fetched.
set(fetched ${CMAKE_CURRENT_SOURCE_DIR}/../build/fetched)

# With DMOE_FETCH and where `found` is nothing: fetch `what`.
function(dmoe_fetch what found)
    if(found OR NOT DMOE_FETCH)
        return()
    endif()
    find_program(DMOE_PYTHON python3 REQUIRED)
    execute_process(COMMAND ${DMOE_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/fetch_cuda.py ${what} ${fetched}
                    COMMAND_ERROR_IS_FATAL ANY)
endfunction()

macro(dmoe_find_nvcc)
    file(GLOB folders ${fetched}/cuda/nvidia/*/bin)
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin ${folders})
endmacro()

macro(dmoe_find_tensorrt)
    file(GLOB folders ${fetched}/tensorrt/*/*/tensorrt)
    find_path(DMOE_TENSORRT_INCLUDE NvInfer.h PATHS /usr/local/tensorrt/include /opt/tensorrt/include ${folders}
              DOC "Folder with NvInfer.h")
endmacro()

if(DEFINED ENV{TENSORRT_INCLUDE})
    set(DMOE_TENSORRT_INCLUDE $ENV{TENSORRT_INCLUDE} CACHE PATH "Folder with NvInfer.h" FORCE)
endif()
dmoe_find_tensorrt()
dmoe_fetch(tensorrt "${DMOE_TENSORRT_INCLUDE}")
dmoe_find_tensorrt()
if(NOT DMOE_TENSORRT_INCLUDE)
    message(FATAL_ERROR "There are no headers of TensorRT: name the folder of NvInfer.h in TENSORRT_INCLUDE, or fetch them with `make plugins` or -DDMOE_FETCH=ON.")
elseif(NOT EXISTS ${DMOE_TENSORRT_INCLUDE}/NvInfer.h)
    message(FATAL_ERROR "The folder ${DMOE_TENSORRT_INCLUDE} has no NvInfer.h: name another in TENSORRT_INCLUDE.")
endif()

if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER $ENV{CUDACXX} CACHE FILEPATH "CUDA's compiler")
endif()
dmoe_find_nvcc()
dmoe_fetch(cuda "${CMAKE_CUDA_COMPILER}")
dmoe_find_nvcc()
if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "There is no nvcc: install CUDA, name its compiler in CUDACXX, or fetch one with `make plugins` or -DDMOE_FETCH=ON.")
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # the -gencode list below says it all
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(DMOE_CUDA_INCLUDE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} CACHE INTERNAL "The compiler's own headers; for tests")
set(gencode "")
foreach(code IN LISTS DMOE_CUDA_CODE)
    list(APPEND gencode "SHELL:-gencode arch=compute_${code},code=sm_${code}")
endforeach()
if(DMOE_CUDA_PTX)
    list(APPEND gencode "SHELL:-gencode arch=compute_${DMOE_CUDA_PTX},code=compute_${DMOE_CUDA_PTX}")
endif()
