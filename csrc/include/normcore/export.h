// Visibility of the public C++ interface. The library is built with hidden visibility; what carries
// NORMCORE_API is its ABI, everything else is private.
#pragma once

#define NORMCORE_API __attribute__((visibility("default")))
