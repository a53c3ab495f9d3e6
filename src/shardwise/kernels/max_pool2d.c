/* 2-d max-pooling of float32 planes, with the index of the value taken: the same bits as torch's own CPU kernel.
 *
 * A plane is one channel of one sample, height x width. A window takes the first of equal values in row-major order, and
 * of values that are not numbers the last: the rule of torch's kernel, by which the gradient finds its way back.
 *
 * Built once for each level of vector instructions; library.py loads the one that fits the processor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct {
  int64_t planes, height, width, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
} shape_t;

/* Every second of 2n - 1 values; the second vector starts one early, so that nothing behind the last value is read. */
#define LANES_4(a, b) __builtin_shufflevector(a, b, 0, 2, 5, 7)
#define LANES_8(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15)
#define LANES_16(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31)

/* windows_n: n windows side by side, 1 or 2 columns apart. `corner` is the first one's upper left value, `place` its
 * index in the plane. */
#define WINDOWS(n)                                                                                            \
  typedef float floats_##n __attribute__((vector_size(4 * n)));                                               \
  typedef int32_t ints_##n __attribute__((vector_size(4 * n)));                                               \
  typedef int64_t longs_##n __attribute__((vector_size(8 * n)));                                              \
  INLINE void windows_##n(const float *corner, int64_t place, int64_t rows, int64_t columns, int64_t width,   \
                          int64_t stride, float *out, int64_t *where) {                                       \
    floats_##n best, value, next;                                                                             \
    ints_##n offset = {0};                                                                                    \
    for (int w = 0; w < n; w++) best[w] = -INFINITY;                                                          \
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < rows; i++)                                                \
      _Pragma("GCC unroll 4") for (int64_t j = 0; j < columns; j++) {                                         \
        const float *from = corner + i * width + j;                                                           \
        memcpy(&value, from, sizeof value);                                                                   \
        if (stride == 2) {                                                                                    \
          memcpy(&next, from + n - 1, sizeof next);                                                           \
          value = LANES_##n(value, next);                                                                     \
        }                                                                                                     \
        ints_##n take = (value > best) | (value != value);                                                    \
        best = (floats_##n)(((ints_##n)value & take) | ((ints_##n)best & ~take));                             \
        offset = (take & (int32_t)(i * width + j)) | (offset & ~take);                                        \
      }                                                                                                       \
    longs_##n index = __builtin_convertvector(offset, longs_##n);                                             \
    for (int w = 0; w < n; w++) index[w] += place + w * stride;                                               \
    memcpy(out, &best, sizeof best);                                                                          \
    memcpy(where, &index, sizeof index);                                                                      \
  }

WINDOWS(4)
#ifdef __AVX2__
WINDOWS(8)
#endif
#ifdef __AVX512F__
WINDOWS(16)
#endif

/* One window, of any size. */
INLINE void window(const float *corner, int64_t place, int64_t rows, int64_t columns, int64_t width, float *out,
                   int64_t *where) {
  float best = -INFINITY;
  int64_t at = place;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) {
      float value = corner[i * width + j];
      if (value > best || value != value) {
        best = value;
        at = place + i * width + j;
      }
    }
  *out = best;
  *where = at;
}

/* The last n windows may overlap the n before; both write the same. */
#define IN_VECTORS(n)                                                                                          \
  if (count >= n) {                                                                                            \
    for (int64_t o = 0; o < count; o += n) {                                                                   \
      int64_t at = o <= count - n ? o : count - n, from = place + at * stride;                                 \
      windows_##n(plane + from, from, rows, columns, width, stride, out + at, where + at);                     \
    }                                                                                                          \
    return;                                                                                                    \
  }

/* `count` windows side by side that lie inside the row. */
INLINE void inside(const float *plane, int64_t place, int64_t rows, int64_t columns, int64_t width, int64_t stride,
                   int64_t count, float *out, int64_t *where) {
  if (stride <= 2) {
#ifdef __AVX512F__
    IN_VECTORS(16)
#endif
#ifdef __AVX2__
    IN_VECTORS(8)
#endif
    IN_VECTORS(4)
  }
  for (int64_t o = 0; o < count; o++)
    window(plane + place + o * stride, place + o * stride, rows, columns, width, out + o, where + o);
}

INLINE void pool(const float *x, float *out, int64_t *where, const shape_t *s, int64_t rows, int64_t columns,
                 int64_t stride) {
  const int64_t height = s->height, width = s->width, out_width = s->out_width;
  /* Windows first..last of a row lie inside it; those before and after reach into the padding. */
  int64_t first = (s->padding_width + stride - 1) / stride;
  int64_t last = width + s->padding_width < columns ? 0 : (width - columns + s->padding_width) / stride + 1;
  if (last > out_width) last = out_width;
  if (first > last) first = last;
  for (int64_t p = 0; p < s->planes; p++, x += height * width)
    for (int64_t oh = 0; oh < s->out_height; oh++, out += out_width, where += out_width) {
      int64_t top = oh * s->stride_height - s->padding_height;
      int64_t bottom = top + rows < height ? top + rows : height;
      if (top < 0) top = 0;
      for (int64_t ow = first > 0 ? 0 : last; ow < out_width; ow = ow + 1 == first ? last : ow + 1) {
        int64_t left = ow * stride - s->padding_width;
        int64_t right = left + columns < width ? left + columns : width;
        if (left < 0) left = 0;
        int64_t place = top * width + left;
        window(x + place, place, bottom - top, right - left, width, out + ow, where + ow);
      }
      int64_t place = top * width + first * stride - s->padding_width;
      if (bottom - top == rows) /* a constant in the frequent cases, so that the loops are unrolled */
        inside(x, place, rows, columns, width, stride, last - first, out + first, where + first);
      else
        inside(x, place, bottom - top, columns, width, stride, last - first, out + first, where + first);
    }
}

/* x: planes x height x width; out, where: planes x out_height x out_width. */
void shardwise_max_pool2d(const float *x, float *out, int64_t *where, const shape_t *s) {
  const int64_t rows = s->kernel_height, columns = s->kernel_width, stride = s->stride_width;
  if (rows == 2 && columns == 2 && stride == 2)
    pool(x, out, where, s, 2, 2, 2);
  else if (rows == 3 && columns == 3 && stride == 2)
    pool(x, out, where, s, 3, 3, 2);
  else if (rows == 3 && columns == 3 && stride == 1)
    pool(x, out, where, s, 3, 3, 1);
  else
    pool(x, out, where, s, rows, columns, stride);
}
