# cmake -DSOURCE=<plugins folder> -DOUTPUT=<header> -P build_id.cmake
# The identity of the kernel and plugin sources: paths and contents, nothing of the machine or the compiler, so that a
# CUDA and a CPU build of the same sources agree.
file(GLOB_RECURSE files LIST_DIRECTORIES false RELATIVE ${SOURCE}
     ${SOURCE}/kernels/*.h ${SOURCE}/kernels/*.cuh ${SOURCE}/kernels/*.cu
     ${SOURCE}/tensorrt/*.h ${SOURCE}/tensorrt/*.cpp)
list(SORT files)
set(lines "")
foreach(file IN LISTS files)
    file(SHA256 ${SOURCE}/${file} hash)
    string(APPEND lines "${hash}  ${file}\n")
endforeach()
string(SHA256 id "${lines}")
string(SUBSTRING ${id} 0 16 id)
set(text "#define DMOE_BUILD_ID \"${id}\"\n")
if(EXISTS ${OUTPUT})
    file(READ ${OUTPUT} old)
endif()
if(NOT "${old}" STREQUAL "${text}")
    file(WRITE ${OUTPUT} "${text}")
endif()
