/* Gradients of 2-d convolutions whose output's gradient is mostly zero: stride 1, no dilation, one group, square kernels of
 * 3, 5 or 7.
 *
 * Behind a max-pooling, at most one value in a window has a gradient: three quarters of it are zeros for windows of 2 x 2,
 * and more where a ReLU follows. What is not zero is looked up, and each such value v at output channel o, row y, column x adds
 *
 *     v * image[c][y + i][x + j]   to the gradient of weight[o][c][i][j],
 *     v * weight[o][c][i][j]       to that of image[c][y + i][x + j].
 *
 * Images are kept with the channels innermost, so that the size * channels values of a kernel's row lie side by side and
 * fill vectors. The order of the sums depends on the sizes and on which values are zero, not on addresses.
 */
#include "conv2d.h"

#define MOST_INSIDE 16
#define FEW 4
#define SAMPLES_TOGETHER 32 /* partial sums of a weight's gradient: long sums round less in two levels */

typedef int32_t vec_of_ints __attribute__((vector_size(4 * LANES)));

INLINE int64_t row_of(const conv_t *s) { return (s->width + 2 * s->padding_width) * s->in_channels; }
INLINE int64_t vectors_of(const conv_t *s) { return up(s->size * s->in_channels) / LANES; }
/* An image with zeros around it; the vectors at its end reach beyond it. */
INLINE int64_t image_of(const conv_t *s) {
  return up((s->height + 2 * s->padding_height) * row_of(s)) + (vectors_of(s) + FEW + 1) * LANES;
}

/* Floats of scratch memory that the function below needs, zeros when it is called. */
int64_t shardwise_conv2d_sparse_scratch(const conv_t *s) {
  int64_t plane = up(s->out_height * s->out_width) + LANES, kernels = s->out_channels * (s->size * vectors_of(s) + 1);
  return 2 * image_of(s) + 3 * plane + (3 * kernels + 1) * LANES;
}

/* The values of a plane that are not zero, and where in the image each one's window begins. Returns how many. With `codes`
 * they are those of a pooled plane, and `steps` tells what a code adds to the place. */
INLINE int64_t find(const float *g, const uint8_t *codes, __m512i steps, int64_t plane, const int32_t *table, int32_t *where,
                    float *values, vec *sum, int *odd) {
  int64_t count = 0;
  for (int64_t k = 0; k < plane; k += LANES) {
    __mmask16 here = first_lanes(plane - k);
    __m512i place = _mm512_loadu_si512(table + k);
    if (codes) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(here, codes + k));
      here &= _mm512_cmplt_epi32_mask(code, _mm512_set1_epi32(NOTHING));
      place = _mm512_add_epi32(place, _mm512_permutexvar_epi32(code, steps));
    }
    const __m512 value = _mm512_maskz_loadu_ps(here, g + k);
    const __mmask16 some = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    *sum += (vec)value;
    *odd |= _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(some, value));
    _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(some, place));
    count += __builtin_popcount(some);
  }
  return count;
}

/* `sums` is [kernel row][vector]. Short kernels are summed in two chains, which need not wait for each other. */
INLINE void to_weights(const float *x, int64_t row, const int32_t *where, const float *values, int64_t count, vec *sums,
                       int size, int vectors) {
  const int chains = size * vectors <= 10 ? 2 : 1;
  vec total[2][7][5];
  UNROLL for (int i = 0; i < size; i++)
    UNROLL for (int v = 0; v < vectors; v++) {
      total[0][i][v] = sums[i * vectors + v];
      total[1][i][v] = (vec){0};
    }
  int64_t n = 0;
  for (; n + chains <= count; n += chains)
    UNROLL for (int chain = 0; chain < chains; chain++) {
      const float *from = x + where[n + chain];
      UNROLL for (int i = 0; i < size; i++)
        UNROLL for (int v = 0; v < vectors; v++) total[chain][i][v] += load(from + i * row + v * LANES) * values[n + chain];
    }
  for (; n < count; n++) {
    const float *from = x + where[n];
    UNROLL for (int i = 0; i < size; i++)
      UNROLL for (int v = 0; v < vectors; v++) total[0][i][v] += load(from + i * row + v * LANES) * values[n];
  }
  UNROLL for (int i = 0; i < size; i++)
    UNROLL for (int v = 0; v < vectors; v++) sums[i * vectors + v] = total[0][i][v] + total[1][i][v];
}

/* `weights` is [kernel row][vector]. */
INLINE void to_image(float *x, int64_t row, const int32_t *where, const float *values, int64_t count, const vec *weights,
                     int size, int vectors) {
  vec weight[7][5];
  UNROLL for (int i = 0; i < size; i++)
    UNROLL for (int v = 0; v < vectors; v++) weight[i][v] = weights[i * vectors + v];
  for (int64_t n = 0; n < count; n++) {
    float *to = x + where[n];
    UNROLL for (int i = 0; i < size; i++)
      UNROLL for (int v = 0; v < vectors; v++) {
        vec sum = load(to + i * row + v * LANES) + weight[i][v] * values[n];
        memcpy(to + i * row + v * LANES, &sum, sizeof sum);
      }
  }
}

/* How 16 columns of few channels change places: value 16 v + l of them with channels innermost is lane l of vector v. */
typedef struct {
  vec_of_ints column[FEW];
  __mmask16 in[FEW][FEW]; /* [vector][channel] */
} places_t;

static void find_places(places_t *p, int64_t channels) {
  for (int64_t at = 0; at < channels * LANES && channels <= FEW; at++) {
    p->column[at / LANES][at % LANES] = (int32_t)(at / channels);
    p->in[at / LANES][at % channels] |= (__mmask16)(1 << at % LANES);
  }
}

/* 16 columns, of which `here` are there; zeros for the others go into the padding, or where the next row will be. */
INLINE void mix(float *to, const float *from, int64_t plane, __mmask16 here, const places_t *p, int channels) {
  __m512 one[FEW];
  UNROLL for (int c = 0; c < channels; c++) one[c] = _mm512_maskz_loadu_ps(here, from + c * plane);
  UNROLL for (int v = 0; v < channels; v++) {
    __m512 mixed = _mm512_setzero_ps();
    UNROLL for (int c = 0; c < channels; c++)
      mixed = _mm512_mask_permutexvar_ps(mixed, p->in[v][c], (__m512i)p->column[v], one[c]);
    _mm512_storeu_ps(to + v * LANES, mixed);
  }
}

/* Channels innermost, from planes. */
INLINE void interleave(float *to, const float *from, const places_t *p, const conv_t *s, int64_t channels) {
  const int64_t row = row_of(s), plane = s->height * s->width;
  to += s->padding_height * row + s->padding_width * channels;
  for (int64_t r = 0; r < s->height; r++, to += row, from += s->width)
    if (channels <= FEW)
      for (int64_t w = 0; w < s->width; w += LANES) {
        __mmask16 here = first_lanes(s->width - w);
        if (channels == 1) mix(to + w, from + w, plane, here, p, 1);
        else if (channels == 2) mix(to + 2 * w, from + w, plane, here, p, 2);
        else if (channels == 3) mix(to + 3 * w, from + w, plane, here, p, 3);
        else mix(to + 4 * w, from + w, plane, here, p, 4);
      }
    else
      for (int64_t c = 0; c < channels; c++)
        for (int64_t w = 0; w < s->width; w++) to[w * channels + c] = from[c * plane + w];
}

INLINE void separate(float *to, const float *from, const conv_t *s, int64_t channels) {
  const int64_t row = row_of(s), plane = s->height * s->width;
  from += s->padding_height * row + s->padding_width * channels;
  for (int64_t r = 0; r < s->height; r++, from += row, to += s->width)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t w = 0; w < s->width; w++) to[c * plane + w] = from[w * channels + c];
}

/* What one call works on. With `codes`, g is the gradient behind a max-pooling that conv2d_pooled.c computed. */
typedef struct {
  const float *x, *g;
  const uint8_t *codes;
  float *of_x;
  int for_weights, odd;
  float *image, *slope_image, *values;
  int32_t *table, *where;
  places_t places;
  vec *spread; /* see all_images */
  vec *weights, *sums, *totals; /* [out channel][kernel row][vector]; behind them [out channel], for the bias */
} work_t;

INLINE void all_samples(work_t *k, const conv_t *s, int64_t channels, int size, int vectors) {
  const int64_t row = row_of(s), kernel = size * vectors, all = s->out_channels * (kernel + 1);
  const int64_t plane = k->codes ? (s->out_height / 2) * (s->out_width / 2) : s->out_height * s->out_width;
  const int32_t right = (int32_t)channels, down = (int32_t)row;
  const __m512i steps = _mm512_castsi128_si512(_mm_set_epi32(down + right, down, right, 0));
  vec *of_bias = k->sums + s->out_channels * kernel;
  for (int64_t n = 0; n < s->samples; n++) {
    if (k->for_weights) interleave(k->image, k->x + n * channels * s->height * s->width, &k->places, s, channels);
    if (k->of_x) memset(k->slope_image, 0, image_of(s) * sizeof(float));
    for (int64_t o = 0; o < s->out_channels; o++) {
      const float *g = k->g + (n * s->out_channels + o) * plane;
      const uint8_t *codes = k->codes ? k->codes + (n * s->out_channels + o) * plane : 0;
      int64_t count = find(g, codes, steps, plane, k->table, k->where, k->values, of_bias + o, &k->odd);
      if (k->for_weights)
        to_weights(k->image, row, k->where, k->values, count, k->sums + o * kernel, size, vectors);
      if (k->of_x)
        to_image(k->slope_image, row, k->where, k->values, count, k->weights + o * kernel, size, vectors);
    }
    if (k->of_x) separate(k->of_x + n * channels * s->height * s->width, k->slope_image, s, channels);
    if (n % SAMPLES_TOGETHER == SAMPLES_TOGETHER - 1 || n == s->samples - 1)
      for (int64_t j = 0; j < all; j++) {
        k->totals[j] += k->sums[j];
        k->sums[j] = (vec){0};
      }
  }
}

#define SIZES(size, vectors)                                                             \
  __attribute__((noinline)) static void samples_##size##_##vectors(work_t *k, const conv_t *s) { \
    all_samples(k, s, s->in_channels, size, vectors);                                    \
  }

SIZES(3, 1) SIZES(3, 2) SIZES(3, 3)
SIZES(5, 1) SIZES(5, 2) SIZES(5, 3) SIZES(5, 4) SIZES(5, 5)
SIZES(7, 1) SIZES(7, 2) SIZES(7, 3) SIZES(7, 4)

typedef void samples_t(work_t *, const conv_t *);

static samples_t *const samples_of[3][5] = {
    {samples_3_1, samples_3_2, samples_3_3, 0, 0},
    {samples_5_1, samples_5_2, samples_5_3, samples_5_4, samples_5_5},
    {samples_7_1, samples_7_2, samples_7_3, samples_7_4, 0},
};

/* The part of g that is not zero, by every eighth sample. */
static double filled(const float *g, const conv_t *s) {
  const int64_t size = s->out_channels * s->out_height * s->out_width;
  int64_t seen = 0, found = 0;
  for (int64_t n = 0; n < s->samples; n += 8, seen += size)
    for (int64_t k = 0; k < size; k += LANES) {
      const __m512 value = _mm512_maskz_loadu_ps(first_lanes(size - k), g + n * size + k);
      found += __builtin_popcount(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    }
  return (double)found / seen;
}

static void pack_rows(vec *to, const float *weights, const conv_t *s) {
  const int64_t vectors = vectors_of(s), square = s->size * s->size;
  for (int64_t o = 0; o < s->out_channels; o++)
    for (int64_t i = 0; i < s->size; i++, to += vectors)
      for (int64_t j = 0; j < s->size; j++)
        for (int64_t c = 0; c < s->in_channels; c++) {
          int64_t at = j * s->in_channels + c;
          to[at / LANES][at % LANES] = weights[(o * s->in_channels + c) * square + i * s->size + j];
        }
}

static void unpack(float *of_weights, float *of_bias, const vec *totals, const conv_t *s) {
  const int64_t vectors = vectors_of(s), square = s->size * s->size, kernel = s->size * vectors;
  for (int64_t o = 0; o < s->out_channels && of_weights; o++)
    for (int64_t c = 0; c < s->in_channels; c++)
      for (int64_t k = 0; k < square; k++) {
        int64_t at = k % s->size * s->in_channels + c;
        of_weights[(o * s->in_channels + c) * square + k] =
            totals[o * kernel + k / s->size * vectors + at / LANES][at % LANES];
      }
  for (int64_t o = 0; o < s->out_channels && of_bias; o++) {
    of_bias[o] = 0;
    for (int l = 0; l < LANES; l++) of_bias[o] += totals[s->out_channels * kernel + o][l];
  }
}

/* Where the windows begin in the image, of output values `step` apart. */
static void tabulate(int32_t *table, const conv_t *s, int64_t step) {
  for (int64_t r = 0; r < s->out_height / step; r++)
    for (int64_t c = 0; c < s->out_width / step; c++)
      *table++ = (int32_t)(step * (r * row_of(s) + c * s->in_channels));
}

/* Each part of a work's memory its place in the scratch memory. */
static void divide(work_t *k, float *scratch, const conv_t *s) {
  const int64_t kernels = s->out_channels * s->size * vectors_of(s), all = kernels + s->out_channels;
  k->weights = aligned(scratch);
  k->sums = k->weights + kernels;
  k->totals = k->sums + all;
  k->image = (float *)(k->totals + all);
  k->slope_image = k->image + image_of(s);
  k->values = k->slope_image + image_of(s);
  k->table = (int32_t *)(k->values + up(s->out_height * s->out_width) + LANES);
  k->where = k->table + up(s->out_height * s->out_width) + LANES;
  find_places(&k->places, s->in_channels);
}

/* x, weights, g, and their gradients as in conv2d.c; of_weights (with of_bias) and of_x are computed where they are not null and
 * no more of g than the part `most_weights`, or `most_x`, is not zero. Returns what was computed: 1 for of_x, 2 for of_weights,
 * 3 for both; 0 also for sizes that are not compiled, and where x, g or a weight is not finite: its product with a zero would
 * be no number, and is left out here. */
int shardwise_conv2d_sparse(const float *x, const float *weights, const float *g, float *of_weights, float *of_bias, float *of_x,
                            float *scratch, const conv_t *s, double most_weights, double most_x) {
  const int64_t vectors = vectors_of(s), inside = s->in_channels;
  if (inside > MOST_INSIDE || vectors > 5 || image_of(s) > INT32_MAX) return 0;
  samples_t *samples = samples_of[s->size / 2 - 1][vectors - 1];
  if (!samples) return 0;
  const double part = filled(g, s);
  if (part > most_weights) of_weights = of_bias = 0;
  if (part > most_x) of_x = 0;
  if (!of_weights && !of_x) return 0;
  if (of_weights && !all_finite(x, s->samples * inside * s->height * s->width)) return 0;
  if (of_x && !all_finite(weights, s->out_channels * inside * s->size * s->size)) return 0;
  work_t k = {.x = x, .g = g, .of_x = of_x, .for_weights = of_weights != 0};
  divide(&k, scratch, s);
  tabulate(k.table, s, 1);
  pack_rows(k.weights, weights, s);
  samples(&k, s);
  unpack(of_weights, of_bias, k.totals, s);
  return k.odd ? 0 : (of_x != 0) + 2 * (of_weights != 0);
}

/* Gradients of images, window by window of the pooling: all output channels add to one stretch of the image, which lies in
 * registers meanwhile. `weights` is [out channel][left, right][row][vector], with a row of zeros above and below. */
INLINE void all_images(work_t *k, const conv_t *s, int64_t channels, int size, int vectors) {
  const int64_t row = row_of(s), plane = (s->out_height / 2) * (s->out_width / 2), kernel = (size + 2) * vectors;
  for (int64_t n = 0; n < s->samples; n++) {
    const float *g = k->g + n * s->out_channels * plane;
    const uint8_t *codes = k->codes + n * s->out_channels * plane;
    memset(k->slope_image, 0, image_of(s) * sizeof(float));
    for (int64_t p = 0; p < plane; p++) {
      vec sum[8][4];
      UNROLL for (int i = 0; i <= size; i++)
        UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = (vec){0};
      for (int64_t o = 0; o < s->out_channels; o++) {
        const int code = codes[o * plane + p];
        const float value = code < NOTHING ? g[o * plane + p] : 0;
        const vec *weights = k->spread + (2 * o + (code & 1)) * kernel + (code & 2 ? 0 : vectors);
        UNROLL for (int i = 0; i <= size; i++)
          UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += weights[i * vectors + v] * value;
      }
      float *to = k->slope_image + k->table[p];
      UNROLL for (int i = 0; i <= size; i++)
        UNROLL for (int v = 0; v < vectors; v++) {
          const vec whole = load(to + i * row + v * LANES) + sum[i][v];
          memcpy(to + i * row + v * LANES, &whole, sizeof whole);
        }
    }
    separate(k->of_x + n * channels * s->height * s->width, k->slope_image, s, channels);
  }
}

#define IMAGES(size, vectors)                                                                   \
  __attribute__((noinline)) static void images_##size##_##vectors(work_t *k, const conv_t *s) { \
    all_images(k, s, s->in_channels, size, vectors);                                            \
  }

IMAGES(3, 1) IMAGES(3, 2) IMAGES(3, 3) IMAGES(3, 4)
IMAGES(5, 1) IMAGES(5, 2) IMAGES(5, 3) IMAGES(5, 4)
IMAGES(7, 1) IMAGES(7, 2) IMAGES(7, 3)

static samples_t *const images_of[3][4] = {
    {images_3_1, images_3_2, images_3_3, images_3_4},
    {images_5_1, images_5_2, images_5_3, images_5_4},
    {images_7_1, images_7_2, images_7_3, 0},
};

INLINE int64_t spread_of(const conv_t *s) { return up((s->size + 1) * s->in_channels) / LANES; }

static void spread(vec *to, const float *weights, const conv_t *s) {
  const int64_t vectors = spread_of(s), square = s->size * s->size;
  for (int64_t o = 0; o < s->out_channels; o++)
    for (int64_t right = 0; right < 2; right++, to += (s->size + 2) * vectors)
      for (int64_t i = 0; i < s->size; i++)
        for (int64_t j = 0; j < s->size; j++)
          for (int64_t c = 0; c < s->in_channels; c++) {
            const int64_t at = (j + right) * s->in_channels + c;
            to[(i + 1) * vectors + at / LANES][at % LANES] = weights[(o * s->in_channels + c) * square + i * s->size + j];
          }
}

/* Floats of scratch memory that the function below needs, zeros when it is called. */
int64_t shardwise_conv2d_pooled_back_scratch(const conv_t *s) {
  return shardwise_conv2d_sparse_scratch(s) + (2 * s->out_channels * (s->size + 2) * spread_of(s) + 1) * LANES;
}

/* As above, where out_height / 2 x out_width / 2 values of g lie behind the max-pooling of conv2d_pooled.c, whose codes these
 * are. of_weights (with of_bias) and of_x are computed where they are not null. Returns 0 for sizes that are not compiled, and
 * where x, g or a weight is not finite. */
int shardwise_conv2d_pooled_back(const float *x, const float *weights, const float *g, const uint8_t *codes, float *of_weights,
                                 float *of_bias, float *of_x, float *scratch, const conv_t *s) {
  const int64_t vectors = vectors_of(s), inside = s->in_channels, plane = (s->out_height / 2) * (s->out_width / 2);
  if (inside > MOST_INSIDE || vectors > 5 || spread_of(s) > 4 || image_of(s) > INT32_MAX) return 0;
  samples_t *samples = samples_of[s->size / 2 - 1][vectors - 1], *images = images_of[s->size / 2 - 1][spread_of(s) - 1];
  if (!samples || !images || !all_finite(g, s->samples * s->out_channels * plane)) return 0;
  if (of_weights && !all_finite(x, s->samples * inside * s->height * s->width)) return 0;
  if (of_x && !all_finite(weights, s->out_channels * inside * s->size * s->size)) return 0;
  work_t k = {.x = x, .g = g, .codes = codes, .for_weights = 1};
  divide(&k, scratch, s);
  tabulate(k.table, s, 2);
  if (of_weights) {
    samples(&k, s);
    unpack(of_weights, of_bias, k.totals, s);
  }
  if (of_x) {
    k.of_x = of_x;
    k.spread = aligned(scratch + shardwise_conv2d_sparse_scratch(s));
    spread(k.spread, weights, s);
    images(&k, s);
  }
  return 1;
}
