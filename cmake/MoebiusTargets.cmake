# Helpers that keep every folder's CMakeLists.txt down to its list of files.

add_library(moebius_flags INTERFACE)
target_compile_options(moebius_flags INTERFACE
  -Wall -Wextra -Wno-restrict $<$<BOOL:${MOEBIUS_WERROR}>:-Werror>
  # (-Wrestrict: GCC 12 warns of its own std::string)
  -ffp-contract=off                          # a fused multiply-add is written where one is meant: docs/numerics.md
  -ffile-prefix-map=${PROJECT_SOURCE_DIR}=.)
target_include_directories(moebius_flags INTERFACE ${PROJECT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/include)
if(MOEBIUS_SANITIZE)
  target_compile_options(moebius_flags INTERFACE -fsanitize=${MOEBIUS_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  if(MOEBIUS_SANITIZE MATCHES address)  # which sees what comes of these by itself; without them the library compiles in two thirds of the time
    target_compile_options(moebius_flags INTERFACE -fno-sanitize=null,object-size,pointer-overflow)
  endif()
  target_link_options(moebius_flags INTERFACE -fsanitize=${MOEBIUS_SANITIZE})
endif()

# moebius_component(name SOURCES … DEPENDS other components and libraries …): one folder of lib/ as a private static library. Its objects go
# into moebius_static too.
function(moebius_component name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(moebius_${name} STATIC ${ARG_SOURCES})
  set_property(GLOBAL APPEND PROPERTY MOEBIUS_OBJECTS $<TARGET_OBJECTS:moebius_${name}>)
  target_link_libraries(moebius_${name} PUBLIC moebius_flags ${ARG_DEPENDS})
endfunction()

# moebius_test(name SOURCES … LINKS … LABELS … [ONE_THREAD] [LONG]): one Catch2 executable, one CTest entry, beside which nothing else
# runs. ONE_THREAD: other tests may; and nothing for the thread sanitizer, under which it is left out. LONG, as cases tagged [long]: with a
# sanitizer only where MOEBIUS_LONG_TESTS is on.
function(moebius_test name)
  cmake_parse_arguments(ARG "ONE_THREAD;LONG" "" "SOURCES;LINKS;LABELS;ARGUMENTS" ${ARGN})
  if((ARG_ONE_THREAD AND MOEBIUS_SANITIZE MATCHES thread) OR (ARG_LONG AND MOEBIUS_SANITIZE AND NOT MOEBIUS_LONG_TESTS))
    return()
  endif()
  add_executable(test_${name} ${ARG_SOURCES})
  target_link_libraries(test_${name} PRIVATE moebius_test_main ${ARG_LINKS})
  target_compile_definitions(test_${name} PRIVATE
    MOEBIUS_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data" MOEBIUS_SHIPPED_MODELS="${PROJECT_SOURCE_DIR}/examples/models")
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(MOEBIUS_SANITIZE AND NOT MOEBIUS_LONG_TESTS)
    list(APPEND ARG_ARGUMENTS ~[long])
  endif()
  add_test(NAME ${name} COMMAND test_${name} ${ARG_ARGUMENTS})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 1500 PROCESSORS 2)
  if(ARG_ONE_THREAD)
    set_tests_properties(${name} PROPERTIES PROCESSORS 1)
  endif()
endfunction()
