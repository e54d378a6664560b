# What is installed, by components: runtime, dev, static; cuda (cuda/) and tools (examples/) have rules of their own. docs/packaging.md.
include(CMakePackageConfigHelpers)
set(packagedir ${CMAKE_INSTALL_LIBDIR}/cmake/moebius)

install(TARGETS moebius EXPORT moebiusTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime NAMELINK_COMPONENT dev)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/moebius DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT dev)
install(FILES ${PROJECT_SOURCE_DIR}/capi/abi/moebius_abi.json DESTINATION ${CMAKE_INSTALL_DATADIR}/moebius COMPONENT dev)
install(EXPORT moebiusTargets NAMESPACE moebius:: DESTINATION ${packagedir} COMPONENT dev)

# An export of its own: who uses the shared library needs nothing else.
if(NOT MOEBIUS_SANITIZE)
  install(TARGETS moebius_static EXPORT moebiusStaticTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT static)
  install(EXPORT moebiusStaticTargets NAMESPACE moebius:: DESTINATION ${packagedir} COMPONENT static)
endif()

set(bindir ${CMAKE_INSTALL_BINDIR})
set(moduledir ${CMAKE_INSTALL_LIBDIR}/moebius)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/moebiusConfig.cmake.in ${PROJECT_BINARY_DIR}/moebiusConfig.cmake
  INSTALL_DESTINATION ${packagedir} PATH_VARS bindir moduledir NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moebiusConfigVersion.cmake COMPATIBILITY SameMajorVersion)  # docs/abi.md: all of one SONAME
install(FILES ${PROJECT_BINARY_DIR}/moebiusConfig.cmake ${PROJECT_BINARY_DIR}/moebiusConfigVersion.cmake
  DESTINATION ${packagedir} COMPONENT dev)

install(FILES ${PROJECT_SOURCE_DIR}/LICENSE ${PROJECT_SOURCE_DIR}/README.md ${PROJECT_SOURCE_DIR}/CHANGELOG.md ${PROJECT_SOURCE_DIR}/CONTRIBUTING.md
  DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/moebius COMPONENT dev)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/docs DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/moebius COMPONENT dev FILES_MATCHING PATTERN *.md PATTERN *.png)

# Relocatable: paths from where the file lies.
file(RELATIVE_PATH prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
file(RELATIVE_PATH libdir ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH includedir ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(${CMAKE_CURRENT_LIST_DIR}/moebius.pc.in ${PROJECT_BINARY_DIR}/moebius.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/moebius.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT dev)
