# attn_ops/libattn_ops_cuda.so: the CUDA kernels, compiled to one image for each architecture, and plain C++ around
# them. No library and no header of CUDA is used, only a compiler for the kernels.
set(ATTN_OPS_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO for where there is a compiler")
set(ATTN_OPS_CUDA_COMPILER nvcc CACHE STRING "nvcc, or nvrtc (12.9), whose kernels run with NVIDIA drivers from 525 on")
set(ATTN_OPS_NVCC "" CACHE FILEPATH "nvcc (found by csrc/cuda/compile.py if empty)")
set(every_architecture sm_80 sm_90a sm_100 sm_120 compute_80)
set(ATTN_OPS_CUDA_ARCHITECTURES ${every_architecture} CACHE STRING
    "Architectures; compute_80 is for all that others do not cover, compiled by the driver. native: of the cards here")
set(ATTN_OPS_CUDA_IMAGES "" CACHE PATH
    "A directory of <architecture>.image, compiled before (one compilation serves the wheels of all Pythons)")
set_property(CACHE ATTN_OPS_CUDA PROPERTY STRINGS AUTO ON OFF)
set_property(CACHE ATTN_OPS_CUDA_COMPILER PROPERTY STRINGS nvcc nvrtc)

set(cuda_dir ${CMAKE_SOURCE_DIR}/csrc/cuda)
set(compile_kernels ${Python_EXECUTABLE} ${cuda_dir}/compile.py)
if(ATTN_OPS_CUDA_COMPILER STREQUAL "nvrtc")
  list(APPEND compile_kernels --nvrtc --spills 128)
elseif(ATTN_OPS_NVCC)
  list(APPEND compile_kernels --nvcc ${ATTN_OPS_NVCC})
endif()

if(ATTN_OPS_CUDA_ARCHITECTURES STREQUAL "native")
  execute_process(COMMAND ${compile_kernels} --native OUTPUT_VARIABLE architectures)
else()
  set(architectures ${ATTN_OPS_CUDA_ARCHITECTURES})
endif()

# What Hopper has beside the others' kernels (csrc/cuda/hopper), in an image of its own.
set(with_hopper ${architectures})
if("sm_90a" IN_LIST architectures)
  list(APPEND with_hopper sm_90a_hopper)
endif()

set(compiler "")
if(ATTN_OPS_CUDA AND NOT ATTN_OPS_CUDA_IMAGES)
  execute_process(COMMAND ${compile_kernels} --find OUTPUT_VARIABLE compiler)
endif()
if(ATTN_OPS_CUDA AND ATTN_OPS_CUDA_IMAGES)
  message(STATUS "CUDA kernels: compiled before, in ${ATTN_OPS_CUDA_IMAGES}, for ${architectures}")
elseif(compiler)
  message(STATUS "CUDA kernels: compiled by ${compiler} for ${architectures}")
elseif(ATTN_OPS_CUDA)
  set(how "Install a CUDA toolkit from 12.8 on, or into ${Python_EXECUTABLE}'s environment its compiler: pip install \
nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
nvidia-cuda-cccl==13.0.85; or give -DATTN_OPS_NVCC=<nvcc>. With -DATTN_OPS_CUDA_COMPILER=nvrtc: pip install \
nvidia-cuda-nvrtc-cu12==12.9.86.")
  if(ATTN_OPS_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: skipped, this build is for CPUs only; there is no ${ATTN_OPS_CUDA_COMPILER}. ${how}")
  else()
    message(FATAL_ERROR
      "attn_ops: ATTN_OPS_CUDA is ${ATTN_OPS_CUDA}, but there is no ${ATTN_OPS_CUDA_COMPILER}. ${how}")
  endif()
else()
  message(STATUS "CUDA kernels: skipped, as ATTN_OPS_CUDA=${ATTN_OPS_CUDA} says")
endif()

# All but the images.
add_library(attn_ops_cuda_host OBJECT ${cuda_dir}/dispatch.cc ${cuda_dir}/driver.cc ${cuda_dir}/hopper/dispatch.cc
            ${CMAKE_SOURCE_DIR}/csrc/bindings/portable.cc)

# `architectures` and after them as many files, their images.
function(add_cuda_library target architectures)
  add_library(${target} MODULE ${cuda_dir}/images.cc $<TARGET_OBJECTS:attn_ops_cuda_host>)
  foreach(architecture image IN ZIP_LISTS architectures ARGN)
    target_compile_definitions(${target} PRIVATE ATTN_OPS_IMAGE_${architecture}="${image}")
  endforeach()
  set_property(SOURCE ${cuda_dir}/images.cc APPEND PROPERTY OBJECT_DEPENDS ${ARGN})
  target_link_libraries(${target} PRIVATE Threads::Threads ${CMAKE_DL_LIBS})
  target_link_options(${target} PRIVATE -Wl,-z,defs)
  export_only(${target} "attn_ops_cuda_*")
endfunction()

file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda_images)
set(images "")
if(ATTN_OPS_CUDA AND ATTN_OPS_CUDA_IMAGES)
  foreach(name IN LISTS with_hopper)
    list(APPEND images ${ATTN_OPS_CUDA_IMAGES}/${name}.image)
  endforeach()
elseif(compiler)
  file(GLOB kernel_headers CONFIGURE_DEPENDS ${cuda_dir}/*.cuh)
  file(GLOB hopper_headers CONFIGURE_DEPENDS ${cuda_dir}/hopper/*.cuh ${cuda_dir}/hopper/*.h)
  set(kernel_headers ${kernel_headers} ${cuda_dir}/args.h ${cuda_dir}/config.h ${CMAKE_SOURCE_DIR}/csrc/attention.h
      ${CMAKE_SOURCE_DIR}/csrc/mask.h)
  function(compile_kernels_for architecture source output)
    get_filename_component(name ${output} NAME)
    add_custom_command(
      OUTPUT ${output}
      COMMAND ${compile_kernels} ${architecture} ${source} -o ${output}
      DEPENDS ${cuda_dir}/compile.py ${source} ${kernel_headers}
      COMMENT "Compiling the CUDA kernels: ${name}"
      VERBATIM)
  endfunction()
  set(source ${cuda_dir}/kernels.cu)
  if(ATTN_OPS_CUDA_COMPILER STREQUAL "nvcc")
    # The architectures' way to PTX, most of the work, is the same for many.
    set(all_ptx "")
    foreach(architecture IN LISTS architectures)
      execute_process(COMMAND ${compile_kernels} --ptx ${architecture} OUTPUT_VARIABLE ptx_${architecture})
      list(APPEND all_ptx ${ptx_${architecture}})
    endforeach()
    list(REMOVE_DUPLICATES all_ptx)
    foreach(ptx IN LISTS all_ptx)
      compile_kernels_for(${ptx} ${source} ${CMAKE_BINARY_DIR}/cuda_images/${ptx}.ptx)
    endforeach()
  endif()
  foreach(architecture IN LISTS architectures)
    if(ptx_${architecture})
      set(source ${CMAKE_BINARY_DIR}/cuda_images/${ptx_${architecture}}.ptx)
    endif()
    set(image ${CMAKE_BINARY_DIR}/cuda_images/${architecture}.image)
    compile_kernels_for(${architecture} ${source} ${image})
    list(APPEND images ${image})
  endforeach()
  if("sm_90a" IN_LIST architectures)
    set(image ${CMAKE_BINARY_DIR}/cuda_images/sm_90a_hopper.image)
    list(APPEND kernel_headers ${hopper_headers})
    compile_kernels_for(sm_90a ${cuda_dir}/hopper/kernels.cu ${image})
    list(APPEND images ${image})
  endif()
endif()
if(images)
  add_cuda_library(attn_ops_cuda "${with_hopper}" ${images})
  install(TARGETS attn_ops_cuda LIBRARY DESTINATION .)
endif()

# For tests of all but the kernels. Not installed: a package without attn_ops_cuda says that it has no kernels.
set(images "")
set(with_hopper ${every_architecture} sm_90a_hopper)
foreach(architecture IN LISTS with_hopper)
  set(image ${CMAKE_BINARY_DIR}/cuda_images/${architecture}.no_kernels)
  file(CONFIGURE OUTPUT ${image} CONTENT "// ${architecture}: no kernels\n")
  list(APPEND images ${image})
endforeach()
add_cuda_library(attn_ops_cuda_without_kernels "${with_hopper}" ${images})
