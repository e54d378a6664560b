// Catch2 2.13 (Debian 12) or 3: tests include this and keep to what both understand.
#pragma once
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
