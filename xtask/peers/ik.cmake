# Takes the place of CMakeLists.txt in the source of ik-llama-cpp-python 0.1.5, which lacks a file that its
# llama-quantize needs. Only what the bindings load is built.
cmake_minimum_required(VERSION 3.21)
project(ik_llama_cpp_python LANGUAGES C CXX)
add_subdirectory(vendor/ik_llama.cpp EXCLUDE_FROM_ALL)
add_custom_target(libraries ALL DEPENDS llama ggml)
install(TARGETS llama ggml LIBRARY DESTINATION ik_llama_cpp/lib)
