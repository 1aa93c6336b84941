/* The numbers of `block_stats` from one read of every tensor: rows and channels of a block and of the parts that write to it.
 *
 * Plain C for any compiler with vector extensions; `_block_native.py` fills `struct job` and says what the numbers become.
 * What is not finite makes a sum that is not finite: the caller looks, and takes the careful pass.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SAME, BFLOAT16, FLOAT16 };      /* how a side lies in memory */
enum { NOT_FINITE = -1, NO_MEMORY = -2 };
enum { ROW_NUMBERS = 4, POWERS = 5 };  /* numbers of a row and sums of a channel */
enum { BLOCK = 32, PIECE = 1024 };     /* rows of a block, values of a row summed in REAL */
enum { BLOCK_BYTES = 1 << 18 };        /* of rows after, which are read a second time: they stay in a core's cache */
enum { LINE = 64, FETCHED = 8, FETCHED_SIDES = 2 }; /* bytes; lines with every LANES channels; before, and after or what is added */
enum { PIVOT_ROWS = 64 };
#define OUTLIER 6.0

struct job {
    const int64_t *sides;  /* addresses of before, of after where there is one, and of what each part wrote, all (rows, features);
                              then bytes from row to row of each; then how it lies */
    const uint8_t *keep;   /* (rows,) which count; NULL: all */
    void *const *by_row;     /* of each part ROW_NUMBERS addresses of (rows,) REAL */
    void *const *by_channel; /* six of (features,) REAL */
    void *pivot;           /* (2, features) REAL: pivots, then 1 / unit; NULL: no channels */
    double *sums;          /* (spans, POWERS, features) */
    void *extremes;        /* (slots, 2, features) REAL */
    double *work;          /* (6, features) */
    int64_t count, rows, features, slot, spans;
    int64_t has_after, parallel, wide;  /* wide: REAL is double, else float */
    int64_t span, start, stop;          /* of one call of block_pass */
    int64_t counted;                    /* rows, for block_end */
};

static inline int counts(const struct job *job, int64_t row)
{
    return job->keep == NULL || job->keep[row];
}

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bfloat16(uint16_t bits)
{
    return as_float((uint32_t)bits << 16);
}

static inline float from_float16(uint16_t bits)
{
    /* The exponent is moved by a product, which also makes subnormal numbers right; infinity and NaN keep the last exponent. */
    float size = as_float((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f;
    uint32_t exact, special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    memcpy(&exact, &size, sizeof exact);
    return as_float(exact | special | (uint32_t)(bits & 0x8000) << 16);
}

#define REAL float
#define INT int32_t
#define NAME(x) x##_float
#define INTEL(x) _mm512_##x##_ps
#include "block_pass.h"
#undef REAL
#undef INT
#undef NAME
#undef INTEL

#define REAL double
#define INT int64_t
#define NAME(x) x##_double
#define INTEL(x) _mm512_##x##_pd
#include "block_pass.h"

/* Three calls: what all need, the rows of a span (from any thread, spans side by side), and what follows from all of them. */

void block_begin(const struct job *job)
{
    if (job->pivot == NULL)
        return;
    int64_t slots = (job->rows + job->slot - 1) / job->slot, features = job->features;
    memset(job->sums, 0, job->spans * POWERS * features * sizeof *job->sums);
    for (int64_t line = 0; line < slots * 2; line++)
        for (int64_t at = line * features; at < (line + 1) * features; at++)
            if (job->wide)
                ((double *)job->extremes)[at] = line % 2 ? INFINITY : -INFINITY;
            else
                ((float *)job->extremes)[at] = line % 2 ? INFINITY : -INFINITY;
    if (job->wide)
        begin_double(job, job->work, job->work + features, job->work + 2 * features);
    else
        begin_float(job, job->work, job->work + features, (float *)(job->work + 2 * features));
}

int64_t block_pass(const struct job *job)
{
    return job->wide ? pass_double(job) : pass_float(job);
}

int64_t block_end(const struct job *job)
{
    return job->wide ? end_double(job, job->work) : end_float(job, job->work);
}
