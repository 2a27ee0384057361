# A shared library that shows only what the file `exports` names, and leaves nothing to be found later.
function(dmoe_library target exports)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>)
    target_link_options(${target} PRIVATE LINKER:--exclude-libs,ALL LINKER:--version-script=${exports})
    if(NOT DMOE_SANITIZE)
        target_link_options(${target} PRIVATE LINKER:--no-undefined)
    endif()
    set_target_properties(${target} PROPERTIES LINK_DEPENDS ${exports})
endfunction()

# Into the package, by a rename: a program that has the old one mapped keeps it.
function(dmoe_install target component)
    install(CODE "
        set(folder \"\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/dmoe_export/lib\")
        file(COPY \"$<TARGET_FILE:${target}>\" DESTINATION \"\${folder}/.partial\")
        file(RENAME \"\${folder}/.partial/$<TARGET_FILE_NAME:${target}>\" \"\${folder}/$<TARGET_FILE_NAME:${target}>\")
        file(REMOVE_RECURSE \"\${folder}/.partial\")
        file(SIZE \"\${folder}/$<TARGET_FILE_NAME:${target}>\" size)
        message(STATUS \"\${folder}/$<TARGET_FILE_NAME:${target}>: \${size} bytes\")" COMPONENT ${component})
endfunction()
