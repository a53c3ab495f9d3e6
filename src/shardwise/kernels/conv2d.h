/* What the kernels of convolutions share: the sizes, and vectors of 16 float32. For AVX-512 only. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#define LANES 16
#define MOST_CHANNELS 8 /* of output, in lanes of columns */
#define NOTHING 4 /* the place of a window in which no value gets a gradient */

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

INLINE __mmask16 first_lanes(int64_t count) { return count < LANES ? (__mmask16)((1u << count) - 1) : 0xffff; }

INLINE int all_finite(const float *values, int64_t count) {
  int odd = 0;
  for (int64_t k = 0; k < count; k += LANES) {
    const __m512 value = _mm512_maskz_loadu_ps(first_lanes(count - k), values + k);
    odd |= _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
  }
  return odd == 0;
}

/* The next address that is a multiple of a vector. */
INLINE void *aligned(void *at) { return (void *)(((uintptr_t)at + sizeof(vec) - 1) / sizeof(vec) * sizeof(vec)); }

/* Rows of a plane with zeros around them, so long that every vector of an output row can be read at every shift. */
INLINE int64_t pitch_of(const conv_t *s) { return up(s->out_width) + up(s->size - 1); }
INLINE int64_t rows_of(const conv_t *s) { return s->height + 2 * s->padding_height; }

INLINE void copy_rows(float *to, int64_t pitch, const float *from, int64_t width, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * pitch, from + r * width, width * sizeof(float));
}

INLINE void copy_padded(float *to, const float *from, const conv_t *s) {
  int64_t pitch = pitch_of(s), plane = rows_of(s) * pitch;
  for (int64_t c = 0; c < s->in_channels; c++)
    copy_rows(to + c * plane + s->padding_height * pitch + s->padding_width, pitch, from + c * s->height * s->width,
              s->width, s->height);
}

/* Two vectors of output, from input rows `one` and `two`, for all output channels; kernel rows first..last. */
INLINE void tile(const float *one, const float *two, const float *weights, const float *bias, const conv_t *s, int channels,
                 int64_t size, int64_t first, int64_t last, vec sums[2][MOST_CHANNELS]) {
  const int64_t pitch = pitch_of(s), plane = rows_of(s) * pitch;
  vec a[MOST_CHANNELS], b[MOST_CHANNELS];
  UNROLL for (int o = 0; o < channels; o++) a[o] = b[o] = (vec){0} + (bias ? bias[o] : 0);
  for (int64_t c = 0; c < s->in_channels; c++)
    for (int64_t i = first; i < last; i++) {
      const float *w = weights + (c * size + i) * size * channels;
      const int64_t at = c * plane + i * pitch;
      UNROLL for (int64_t j = 0; j < size; j++, w += channels) {
        vec x = load(one + at + j), y = load(two + at + j);
        UNROLL for (int o = 0; o < channels; o++) {
          a[o] += x * w[o];
          b[o] += y * w[o];
        }
      }
    }
  UNROLL for (int o = 0; o < channels; o++) {
    sums[0][o] = a[o];
    sums[1][o] = b[o];
  }
}

/* [in channel][row][column][out channel], from a convolution's [out][in][row][column]; `back`: those of the convolution
 * that turns the gradient of its output into that of its input. */
INLINE void pack(float *to, const float *weights, const conv_t *s, int back) {
  const int64_t square = s->size * s->size;
  for (int64_t c = 0; c < s->in_channels; c++)
    for (int64_t k = 0; k < square; k++)
      for (int64_t o = 0; o < s->out_channels; o++)
        *to++ = back ? weights[(c * s->out_channels + o) * square + square - 1 - k]
                     : weights[(o * s->in_channels + c) * square + k];
}
