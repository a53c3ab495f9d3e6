/* 2-d convolutions of float32 planes with few channels, and their gradients: stride 1, no dilation, one group, square
 * kernels of 3, 5 or 7.
 *
 * oneDNN puts channels into the lanes of a vector, and leaves most of them empty where a layer has six of them. Here the
 * lanes hold neighbouring columns of a row instead: an output row is a sum of shifted input rows times one weight each.
 * Every sum has one order, which depends on the sizes alone: neither on where a sample is in its batch nor on addresses.
 *
 * For AVX-512 only: with shorter vectors, oneDNN's kernels were too often as fast.
 */
#include "conv2d.h"

#define SAMPLES_TOGETHER 32 /* partial sums of a weight's gradient: long sums round less in two levels */

/* Floats of scratch memory that both functions below need, zeros when they are called. */
int64_t shardwise_conv2d_scratch(const conv_t *s) {
  int64_t weights = s->in_channels * s->out_channels * s->size * s->size;
  return s->in_channels * rows_of(s) * pitch_of(s) + s->out_channels * s->out_height * up(s->out_width) +
         2 * (weights + s->out_channels) * LANES + LANES;
}

/* The first `left` lanes of a vector. */
INLINE void store(float *to, vec value, int64_t left) {
  if (left >= LANES) memcpy(to, &value, sizeof value);
  else _mm512_mask_storeu_ps(to, (__mmask16)((1u << left) - 1), (__m512)value);
}

INLINE void put(float *out, const vec *sums, int channels, int64_t row, int64_t column, const conv_t *s) {
  int64_t plane = s->out_height * s->out_width;
  out += row * s->out_width + column;
  UNROLL for (int o = 0; o < channels; o++) store(out + o * plane, sums[o], s->out_width - column);
}

INLINE void correlate(const float *x, const float *weights, const float *bias, float *out, float *values, const conv_t *s,
                      int channels, int64_t size) {
  const int64_t pitch = pitch_of(s), pairs = up(s->out_width) / LANES / 2 * 2 * LANES;
  vec sums[2][MOST_CHANNELS];
  for (int64_t n = 0; n < s->samples; n++, out += channels * s->out_height * s->out_width) {
    copy_padded(values, x + n * s->in_channels * s->height * s->width, s);
    for (int64_t row = 0; row < s->out_height; row += 2) {
      /* Kernel rows that meet nothing but padding, from both rows of output, are left out. */
      int64_t next = row + 1 < s->out_height, end = s->height + s->padding_height - row;
      int64_t first = s->padding_height - row - next, last = end < size ? end : size;
      if (first < 0) first = 0;
      for (int64_t r = row; r <= row + next; r++) {
        const float *from = values + r * pitch;
        for (int64_t column = 0; column < pairs; column += 2 * LANES) {
          tile(from + column, from + column + LANES, weights, bias, s, channels, size, first, last, sums);
          put(out, sums[0], channels, r, column, s);
          put(out, sums[1], channels, r, column + LANES, s);
        }
      }
      if (pairs == up(s->out_width)) continue;
      const float *from = values + row * pitch + pairs; /* the last vectors of both rows */
      tile(from, from + next * pitch, weights, bias, s, channels, size, first, last, sums);
      put(out, sums[0], channels, row, pairs, s);
      if (next) put(out, sums[1], channels, row + 1, pairs, s);
    }
  }
}

#define FOR_CHANNELS(channels)                                                                \
  case channels:                                                                              \
    if (s->size == 3) correlate(x, packed, bias, out, values, s, channels, 3);      \
    else if (s->size == 5) correlate(x, packed, bias, out, values, s, channels, 5); \
    else correlate(x, packed, bias, out, values, s, channels, 7);                   \
    break;

/* x: samples x in_channels x height x width; weights: out_channels x in_channels x size x size, or, with `back`,
 * in_channels x out_channels x size x size; bias: out_channels, or null; out: samples x out_channels x out_height x
 * out_width. Returns 0, and does nothing, where a weight is not finite: its product with the zeros around x would be no
 * number. */
int shardwise_conv2d(const float *x, const float *weights, const float *bias, float *out, float *scratch, const conv_t *s,
                     int back) {
  float *packed = scratch + s->in_channels * rows_of(s) * pitch_of(s), *values = scratch;
  if (!all_finite(weights, s->in_channels * s->out_channels * s->size * s->size)) return 0;
  pack(packed, weights, s, back);
  switch (s->out_channels) {
    FOR_CHANNELS(1)
    FOR_CHANNELS(2)
    FOR_CHANNELS(3)
    FOR_CHANNELS(4)
    FOR_CHANNELS(5)
    FOR_CHANNELS(6)
    FOR_CHANNELS(7)
    FOR_CHANNELS(8)
    default: return 0;
  }
  return 1;
}

/* One row of a kernel for one input and some output channels, over all output rows of a sample. `sums` is
 * [kernel column][output channel] in steps of `step`. */
INLINE void row_gradient(const float *x, int64_t pitch, const float *g, int64_t plane, int64_t width, int64_t rows, int size,
                         int channels, vec *sums, int64_t step) {
  vec total[7][6];
  UNROLL for (int j = 0; j < size; j++)
    UNROLL for (int o = 0; o < channels; o++) total[j][o] = sums[j * step + o];
  for (int64_t r = 0; r < rows; r++)
    for (int64_t v = 0; v < width; v += LANES) {
      vec slope[6];
      UNROLL for (int o = 0; o < channels; o++) slope[o] = load(g + o * plane + r * width + v);
      UNROLL for (int j = 0; j < size; j++) {
        vec value = load(x + r * pitch + v + j);
        UNROLL for (int o = 0; o < channels; o++) total[j][o] += value * slope[o];
      }
    }
  UNROLL for (int j = 0; j < size; j++)
    UNROLL for (int o = 0; o < channels; o++) sums[j * step + o] = total[j][o];
}

INLINE void sample_gradient(const float *x, const float *g, vec *sums, const conv_t *s, int size, int together) {
  const int64_t pitch = pitch_of(s), width = up(s->out_width), plane = s->out_height * width;
  for (int64_t o = 0; o < s->out_channels; o += together)
    for (int64_t c = 0; c < s->in_channels; c++)
      for (int64_t i = 0; i < size; i++) {
        vec *into = sums + (c * size + i) * size * s->out_channels + o;
        const float *from = x + (c * rows_of(s) + i) * pitch;
        if (s->out_channels - o >= together)
          row_gradient(from, pitch, g + o * plane, plane, width, s->out_height, size, together, into, s->out_channels);
        else
          for (int64_t left = o; left < s->out_channels; left++, into++)
            row_gradient(from, pitch, g + left * plane, plane, width, s->out_height, size, 1, into, s->out_channels);
      }
}

/* x as above; g: samples x out_channels x out_height x out_width; gradient: out_channels x in_channels x size x size;
 * bias: out_channels, or null. Returns 0 where what it found is not finite: a lane beyond a row multiplies a value of x
 * by zero, which is no number for an infinite one, so that more may be lost than should be. */
int shardwise_conv2d_weight(const float *x, const float *g, float *gradient, float *bias, float *scratch, const conv_t *s) {
  const int64_t kernel = s->in_channels * s->size * s->size, count = kernel * s->out_channels, all = count + s->out_channels;
  const int64_t width = up(s->out_width), plane = s->out_height * width;
  vec *sums = aligned(scratch), *totals = sums + all;
  float *values = (float *)(totals + all), *slopes = values + s->in_channels * rows_of(s) * pitch_of(s);
  for (int64_t n = 0; n < s->samples; n++) {
    copy_padded(values, x + n * s->in_channels * s->height * s->width, s);
    copy_rows(slopes, width, g + n * s->out_channels * s->out_height * s->out_width, s->out_width,
              s->out_channels * s->out_height);
    if (s->size == 3) sample_gradient(values, slopes, sums, s, 3, 6);
    else if (s->size == 5) sample_gradient(values, slopes, sums, s, 5, 4);
    else sample_gradient(values, slopes, sums, s, 7, 3);
    if (bias)
      for (int64_t o = 0; o < s->out_channels; o++) {
        vec sum = {0};
        for (int64_t v = 0; v < plane; v += LANES) sum += load(slopes + o * plane + v);
        sums[count + o] += sum;
      }
    if (n % SAMPLES_TOGETHER == SAMPLES_TOGETHER - 1 || n == s->samples - 1)
      for (int64_t k = 0; k < all; k++) {
        totals[k] += sums[k];
        sums[k] = (vec){0};
      }
  }
  for (int64_t k = 0; k < all; k++) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += totals[k][l];
    if (k < count) gradient[k % s->out_channels * kernel + k / s->out_channels] = sum;
    else if (bias) bias[k - count] = sum;
  }
  return all_finite(gradient, count) && (!bias || all_finite(bias, s->out_channels));
}
