/* A 2-d convolution and the max-pooling behind it in one pass, with a ReLU between them if asked for: convolutions as in
 * conv2d.c, windows of 2 x 2 two apart. What the convolution alone would give is never written to memory.
 *
 * The place of each window's largest value is kept as a number from 0 to 3, row by row, or NOTHING where a ReLU lets no
 * gradient through; ties and values that are no number go as in torch. The backward pass is in conv2d_sparse.c.
 */
#include "conv2d.h"

#define MOST_WINDOWS 5 /* side by side: two rows of two columns each fill the registers */
#define UNROLL_COLUMNS _Pragma("GCC unroll 10")

/* Largest of a, and of b where it is larger or no number. Returns where b was taken. */
INLINE __mmask16 larger(__m512 *a, __m512 b) {
  const __mmask16 take = _mm512_cmp_ps_mask(b, *a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
  *a = _mm512_mask_mov_ps(*a, take, b);
  return take;
}

INLINE __m128i codes_of(__mmask16 column, __mmask16 row, __m512 *best, int relu) {
  __m128i code = _mm_or_si128(_mm_maskz_set1_epi8(column, 1), _mm_maskz_set1_epi8(row, 2));
  if (!relu) return code;
  const __mmask16 dead = _mm512_cmp_ps_mask(*best, _mm512_setzero_ps(), _CMP_LE_OQ);
  *best = _mm512_mask_mov_ps(*best, dead, _mm512_setzero_ps());
  return _mm_mask_set1_epi8(code, dead, NOTHING);
}

/* 8 windows from two rows of 16 columns, of which the first `left` count. The others may be stored too where there is `room`,
 * because rows are computed in order and what they overwrite comes later: storing parts of vectors takes AMD's processors long. */
INLINE void pool_columns(vec one, vec two, float *out, uint8_t *codes, int64_t left, int64_t room, int relu) {
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  __m512 best = _mm512_permutex2var_ps((__m512)one, evens, (__m512)two);
  const __mmask16 column = larger(&best, _mm512_permutex2var_ps((__m512)one, odds, (__m512)two));
  const __mmask16 row = larger(&best, _mm512_shuffle_f32x4(best, best, 0x0e)); /* the upper half */
  const __m128i code = codes_of((column & ~row) | (column >> 8 & row), row, &best, relu);
  if (room >= 8) {
    _mm256_storeu_ps(out, _mm512_castps512_ps256(best));
    _mm_storel_epi64((__m128i *)codes, code);
    return;
  }
  const __mmask16 here = left < 8 ? (__mmask16)((1 << left) - 1) : 0xff;
  _mm512_mask_storeu_ps(out, here, best);
  _mm_mask_storeu_epi8(codes, here, code);
}

/* What one call works on. */
typedef struct {
  const float *x, *weights, *bias;
  float *out, *values, *windows;
  uint8_t *codes, *places;
  int relu;
} pooled_t;

/* Kernel rows that meet more than padding, from output rows `row` and the one below. */
INLINE void rows_inside(const conv_t *s, int64_t row, int64_t *first, int64_t *last) {
  const int64_t start = s->padding_height - row - 1, end = s->height + s->padding_height - row;
  *first = start > 0 ? start : 0;
  *last = end < s->size ? end : s->size;
}

/* Lanes are neighbouring columns, for few output channels. */
INLINE void by_columns(const pooled_t *k, const conv_t *s, int channels, int64_t size) {
  const int64_t pitch = pitch_of(s), high = s->out_height / 2, wide = s->out_width / 2;
  vec sums[2][MOST_CHANNELS];
  for (int64_t n = 0; n < s->samples; n++) {
    copy_padded(k->values, k->x + n * s->in_channels * s->height * s->width, s);
    for (int64_t row = 0; row < high; row++) {
      int64_t first, last;
      rows_inside(s, 2 * row, &first, &last);
      for (int64_t column = 0; column < wide; column += LANES / 2) {
        const float *from = k->values + 2 * row * pitch + 2 * column;
        tile(from, from + pitch, k->weights, k->bias, s, channels, size, first, last, sums);
        const int64_t at = (n * channels * high + row) * wide + column, room = (high - row) * wide - column;
        UNROLL for (int o = 0; o < channels; o++)
          pool_columns(sums[0][o], sums[1][o], k->out + at + o * high * wide, k->codes + at + o * high * wide, wide - column,
                       room, k->relu);
      }
    }
  }
}

/* `count` windows side by side, for 16 output channels. */
INLINE void windows_of(const float *from, const float *weights, vec bias, float *out, uint8_t *codes, const conv_t *s,
                       int64_t size, int count, int64_t first, int64_t last, int relu) {
  const int64_t pitch = pitch_of(s), plane = rows_of(s) * pitch;
  vec sums[2][2 * MOST_WINDOWS];
  UNROLL_COLUMNS for (int q = 0; q < 2 * count; q++) sums[0][q] = sums[1][q] = bias;
  for (int64_t c = 0; c < s->in_channels; c++)
    for (int64_t i = first; i < last; i++) {
      const float *w = weights + (c * size + i) * size * LANES, *x = from + c * plane + i * pitch;
      UNROLL for (int64_t j = 0; j < size; j++) {
        const vec weight = load(w + j * LANES);
        UNROLL_COLUMNS for (int q = 0; q < 2 * count; q++) {
          sums[0][q] += weight * x[j + q];
          sums[1][q] += weight * x[pitch + j + q];
        }
      }
    }
  UNROLL_COLUMNS for (int q = 0; q < count; q++) {
    __m512 best = (__m512)sums[0][2 * q], below = (__m512)sums[1][2 * q];
    __mmask16 column = larger(&best, (__m512)sums[0][2 * q + 1]);
    const __mmask16 column_below = larger(&below, (__m512)sums[1][2 * q + 1]), row = larger(&best, below);
    column = (column & ~row) | (column_below & row);
    const __m128i code = codes_of(column, row, &best, relu);
    _mm512_storeu_ps(out + q * LANES, best);
    _mm_storeu_si128((__m128i *)(codes + q * LANES), code);
  }
}

#define WINDOWS(count)                                                                                               \
  case count:                                                                                                        \
    windows_of(from, weights, bias, k->windows + at, k->places + at, s, size, count, first, last, k->relu); \
    break;

/* Lanes are output channels, for many of them. */
INLINE void by_channels(const pooled_t *k, const conv_t *s, int64_t size) {
  const int64_t pitch = pitch_of(s), high = s->out_height / 2, wide = s->out_width / 2, plane = high * wide;
  for (int64_t n = 0; n < s->samples; n++) {
    copy_padded(k->values, k->x + n * s->in_channels * s->height * s->width, s);
    for (int64_t block = 0; block < s->out_channels; block += LANES) {
      const float *weights = k->weights + block * s->in_channels * size * size;
      const int64_t lanes = s->out_channels - block < LANES ? s->out_channels - block : LANES;
      vec bias = {0};
      for (int64_t o = 0; o < lanes && k->bias; o++) bias[o] = k->bias[block + o];
      for (int64_t row = 0; row < high; row++) {
        int64_t first, last;
        rows_inside(s, 2 * row, &first, &last);
        for (int64_t column = 0; column < wide; column += MOST_WINDOWS) {
          const float *from = k->values + 2 * row * pitch + 2 * column;
          const int64_t at = (row * wide + column) * LANES;
          switch (wide - column) {
            WINDOWS(1)
            WINDOWS(2)
            WINDOWS(3)
            WINDOWS(4)
            default: windows_of(from, weights, bias, k->windows + at, k->places + at, s, size, 5, first, last, k->relu);
          }
        }
      }
      float *out = k->out + (n * s->out_channels + block) * plane;
      uint8_t *codes = k->codes + (n * s->out_channels + block) * plane;
      for (int64_t o = 0; o < lanes; o++)
        for (int64_t p = 0; p < plane; p++) {
          out[o * plane + p] = k->windows[p * LANES + o];
          codes[o * plane + p] = k->places[p * LANES + o];
        }
    }
  }
}

INLINE int64_t padded_channels(const conv_t *s) {
  return s->out_channels <= MOST_CHANNELS ? s->out_channels : up(s->out_channels);
}

/* Floats of scratch memory that the function below needs, zeros when it is called. */
int64_t shardwise_conv2d_pooled_scratch(const conv_t *s) {
  return s->in_channels * rows_of(s) * pitch_of(s) + padded_channels(s) * s->in_channels * s->size * s->size +
         (s->out_height / 2) * (s->out_width / 2) * 2 * LANES;
}

#define FOR_CHANNELS(channels)                                  \
  case channels:                                                \
    if (s->size == 3) by_columns(&k, s, channels, 3);           \
    else if (s->size == 5) by_columns(&k, s, channels, 5);      \
    else by_columns(&k, s, channels, 7);                        \
    break;

/* x, weights, bias: as in conv2d.c; out, codes: samples x out_channels x out_height / 2 x out_width / 2. Returns 0, and does
 * nothing, where a weight is not finite: its product with the zeros around x would be no number. */
int shardwise_conv2d_pooled(const float *x, const float *weights, const float *bias, float *out, uint8_t *codes,
                            float *scratch, const conv_t *s, int relu) {
  const int64_t kernel = s->in_channels * s->size * s->size, channels = padded_channels(s);
  float *packed = scratch + s->in_channels * rows_of(s) * pitch_of(s), *windows = packed + channels * kernel;
  if (!all_finite(weights, s->out_channels * kernel)) return 0;
  const pooled_t k = {x, packed, bias, out, scratch, windows, codes,
                      (uint8_t *)(windows + (s->out_height / 2) * (s->out_width / 2) * LANES), relu};
  if (s->out_channels > MOST_CHANNELS) {
    for (int64_t o = 0; o < s->out_channels; o++)
      for (int64_t at = 0; at < kernel; at++)
        packed[(o / LANES * kernel + at) * LANES + o % LANES] = weights[o * kernel + at];
    if (s->size == 3) by_channels(&k, s, 3);
    else if (s->size == 5) by_channels(&k, s, 5);
    else by_channels(&k, s, 7);
    return 1;
  }
  pack(packed, weights, s, 0);
  switch (s->out_channels) {
    FOR_CHANNELS(1)
    FOR_CHANNELS(2)
    FOR_CHANNELS(3)
    FOR_CHANNELS(4)
    FOR_CHANNELS(5)
    FOR_CHANNELS(6)
    FOR_CHANNELS(7)
    FOR_CHANNELS(8)
  }
  return 1;
}
