/* What the kernels of convolutions share: the sizes, and vectors of 16 float32. For AVX-512 only. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES)));

/* height and width are those of x, out_ those of the result (or its gradient); the kernel is size x size. */
typedef struct {
  int64_t samples, in_channels, out_channels, height, width, out_height, out_width, size, padding_height, padding_width;
} conv_t;

INLINE vec load(const float *from) {
  vec value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE int64_t up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

INLINE int all_finite(const float *values, int64_t count) {
  int64_t odd = 0;
  for (int64_t k = 0; k < count; k++) odd += !(fabsf(values[k]) < INFINITY);
  return odd == 0;
}

/* The next address that is a multiple of a vector. */
INLINE void *aligned(void *at) { return (void *)(((uintptr_t)at + sizeof(vec) - 1) / sizeof(vec) * sizeof(vec)); }
