// What the kernels include, before any instruction set is switched on. The linker keeps one copy of an inline function,
// or of an instance of a template, for the whole library: none may be compiled for a special instruction set. So the
// kernels use only types of the standard library, and no functions.
#pragma once

#include "../core/half.h"
#include "../core/mean_embedding.h"
#include "attention_tile.h"
#include "kernels.h"

#include <string.h>
#include <type_traits>
#include <utility>

#if defined(EBFT_X86)
#include <immintrin.h>
#endif
