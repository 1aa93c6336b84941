/* The pass over one type: block_pass.c defines what vector.h asks for, and what does not depend on the type.
 *
 * Within PIECE values of a row, and within a block of at most BLOCK rows of a channel, sums are kept in REAL, one a lane; beyond
 * that in double.
 */

#include "vector.h"

/* The squares of before, after and after - before, and before.after, from `i` on, LANES values at a time, added to `sums`; where
 * that ended. With `to`, `other` is not after but what is added to before, and the sum is written there. A function of its own:
 * inlined, gcc 12 keeps sums that are taken apart later in memory. */
static __attribute__((noinline)) int64_t NAME(piece)(const REAL *before, const REAL *other, REAL *to, int64_t i, int64_t end,
                                                     NAME(wide) sums[ROW_NUMBERS])
{
    NAME(vec) bb = {0}, aa = {0}, dd = {0}, ab = {0};
    if (to == NULL)
        for (; i + LANES <= end; i += LANES) {
            NAME(vec) b = NAME(load)(before + i), a = NAME(load)(other + i), d = a - b;
            bb += b * b, aa += a * a, dd += d * d, ab += a * b;
        }
    else
        for (; i + LANES <= end; i += LANES) {
            NAME(vec) b = NAME(load)(before + i), d = NAME(load)(other + i), a = b + d;
            NAME(store)(to + i, a);
            bb += b * b, aa += a * a, dd += d * d, ab += a * b;
        }
    sums[0] += NAME(folded)(bb), sums[1] += NAME(folded)(aa);
    sums[2] += NAME(folded)(dd), sums[3] += NAME(folded)(ab);
    return i;
}

/* The same of a whole row. */
static void NAME(compare)(const REAL *before, const REAL *other, REAL *to, int64_t features, double found[ROW_NUMBERS])
{
    NAME(wide) sums[ROW_NUMBERS] = {{0}};
    memset(found, 0, ROW_NUMBERS * sizeof *found);
    for (int64_t start = 0; start < features; start += PIECE) {
        int64_t end = start + PIECE < features ? start + PIECE : features;
        for (int64_t i = NAME(piece)(before, other, to, start, end, sums); i < end; i++) {
            REAL sum = to == NULL ? other[i] : before[i] + other[i];
            double b = before[i], a = sum, d = to == NULL ? (REAL)(other[i] - before[i]) : other[i];
            if (to != NULL)
                to[i] = sum;
            found[0] += b * b, found[1] += a * a, found[2] += d * d, found[3] += a * b;
        }
    }
    for (int number = 0; number < ROW_NUMBERS; number++)
        found[number] += NAME(total)(sums[number]);
}

/* One row of a side: where it lies, or widened into `buffer`. */
static const REAL *NAME(row)(const struct job *job, int64_t side, int64_t row, REAL *buffer)
{
    const char *from = (const char *)job->sides[side] + row * job->sides[job->count + side];
    const uint16_t *narrow = (const uint16_t *)from;
    switch (job->sides[2 * job->count + side]) {
    case BFLOAT16:
        for (int64_t i = 0; i < job->features; i++)
            buffer[i] = from_bfloat16(narrow[i]);
        return buffer;
    case FLOAT16:
        for (int64_t i = 0; i < job->features; i++)
            buffer[i] = from_float16(narrow[i]);
        return buffer;
    default:
        return (const REAL *)from;
    }
}

/* Norms before and after, cosine and relative change of one row into ROW_NUMBERS arrays; whether all squares are finite. */
static int NAME(say)(const double found[ROW_NUMBERS], int64_t row, void *const *into)
{
    double before = sqrt(found[0]), after = sqrt(found[1]), cosine = found[3] / before / after;
    ((REAL *)into[0])[row] = before;
    ((REAL *)into[1])[row] = after;
    ((REAL *)into[2])[row] = !(before > 0 && after > 0) ? NAN : cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
    ((REAL *)into[3])[row] = before > 0 ? sqrt(found[2]) / before : NAN;
    return isfinite(found[0]) && isfinite(found[1]) && isfinite(found[2]) && isfinite(found[3]);
}

/* Numbers of a row, of the whole and of each part; NULL where not all is finite, else the row after. `room` is for that row,
 * `work` for three. */
static const REAL *NAME(measure)(const struct job *job, int64_t row, REAL *room, REAL *work)
{
    int64_t features = job->features, side = 1;
    void *const *into = job->by_row;
    const REAL *before = NAME(row)(job, 0, row, work), *after = NULL;
    REAL *given = work + features, *sum = room;
    double found[ROW_NUMBERS];
    int finite = 1;
    if (job->has_after) {
        after = NAME(row)(job, side++, row, room);
        NAME(compare)(before, after, NULL, features, found);
        finite &= NAME(say)(found, row, into);
        into += ROW_NUMBERS;
        sum = work + 2 * features;
    }
    for (const REAL *reads = before; side < job->count; side++, into += ROW_NUMBERS) {
        NAME(compare)(reads, NAME(row)(job, side, row, given), sum, features, found);
        finite &= NAME(say)(found, row, into);
        if (!job->parallel)
            reads = sum;
    }
    return !finite ? NULL : after ? after : sum;
}

/* Zeros, powers 1 to 4 of (y - pivot) / unit, and extremes, of LANES channels from `at` on. */
static inline void NAME(some_channels)(const REAL **rows, int count, int64_t at, const struct job *job, double *sums, REAL *high)
{
    const REAL *pivots = job->pivot, *per_unit = pivots + job->features;
    REAL *low = high + job->features;
    NAME(vec) pivot = NAME(load)(pivots + at), unit = NAME(load)(per_unit + at), none = {0}, one = none + 1;
    NAME(vec) top = NAME(load)(high + at), bottom = NAME(load)(low + at), powers[POWERS] = {{0}};
    for (int row = 0; row < count; row++) {
        NAME(vec) y = NAME(load)(rows[row] + at), u = (y - pivot) * unit, square = u * u;
        powers[0] += NAME(pick)(y == none, one, none);
        powers[1] += u, powers[2] += square, powers[3] += square * u, powers[4] += square * square;
        top = NAME(greater)(y, top);
        bottom = NAME(lesser)(y, bottom);
    }
    NAME(store)(high + at, top);
    NAME(store)(low + at, bottom);
    for (int power = 0; power < POWERS; power++)
        NAME(add_to)(sums + power * job->features + at, powers[power]);
}

/* The channels of some rows. Meanwhile memory is idle: with every LANES channels some lines are asked for of what is compared next,
 * row `next` and on, one after the other. (As many as a block has, or row by row at the same channels, took longer than none.) */
static void NAME(channels)(const REAL **rows, int count, const struct job *job, double *sums, REAL *high, int64_t next)
{
    int64_t features = job->features, at = 0;
    const char *ahead[FETCHED_SIDES] = {NULL};
    for (int side = 0; side < FETCHED_SIDES && next < job->stop; side++)
        ahead[side] = (const char *)job->sides[side] + next * job->sides[job->count + side];
    for (; at + LANES <= features; at += LANES) {
        NAME(some_channels)(rows, count, at, job, sums, high);
        for (int side = 0; side < FETCHED_SIDES && ahead[side] != NULL; side++)
            for (int line = 0; line < FETCHED; line++, ahead[side] += LINE)
                __builtin_prefetch(ahead[side], 0, 2);
    }
    const REAL *pivot = job->pivot, *per_unit = pivot + features;
    REAL *low = high + features;
    for (; at < features; at++)
        for (int row = 0; row < count; row++) {
            REAL y = rows[row][at], u = (y - pivot[at]) * per_unit[at], square = u * u;
            REAL powers[POWERS] = {y == 0, u, square, square * u, square * square};
            for (int power = 0; power < POWERS; power++)
                sums[power * features + at] += powers[power];
            high[at] = y > high[at] ? y : high[at];
            low[at] = y < low[at] ? y : low[at];
        }
}

/* One row after; `buffer` (2, features) is written to if it has to be made. */
static const REAL *NAME(after)(const struct job *job, int64_t row, REAL *buffer)
{
    const REAL *given = NAME(row)(job, job->has_after, row, buffer);
    if (job->has_after)
        return given;
    const REAL *written = NAME(row)(job, 1, row, buffer + job->features);
    for (int64_t i = 0; i < job->features; i++)
        buffer[i] = given[i] + written[i];
    return buffer;
}

/* Mean of every channel over the first rows that count, and one over a power of two near their standard deviation. */
static void NAME(begin)(const struct job *job, double *mean, double *spread, REAL *buffer)
{
    int64_t features = job->features, counted = 0, first[PIVOT_ROWS];
    REAL *pivot = job->pivot, *per_unit = pivot + features;
    memset(mean, 0, features * sizeof *mean);
    memset(spread, 0, features * sizeof *spread);
    for (int64_t row = 0; row < job->rows && counted < PIVOT_ROWS; row++)
        if (counts(job, row)) {
            const REAL *y = NAME(after)(job, row, buffer);
            first[counted++] = row;
            for (int64_t i = 0; i < features; i++)
                mean[i] += y[i];
        }
    for (int64_t i = 0; i < features; i++)
        pivot[i] = mean[i] / (counted ? counted : 1);
    for (int64_t k = 0; k < counted; k++) {
        const REAL *y = NAME(after)(job, first[k], buffer);
        for (int64_t i = 0; i < features; i++) {
            double away = (double)y[i] - pivot[i];
            spread[i] += away * away;
        }
    }
    for (int64_t i = 0; i < features; i++) {
        int power = 1; /* a constant channel has the unit 1 */
        if (spread[i] > 0 && isfinite(spread[i]))
            frexp(sqrt(spread[i] / counted), &power);
        power = power < -60 ? -60 : power > 60 ? 60 : power;
        per_unit[i] = ldexp(1, 1 - power);
    }
}

/* Rows from `start` to `stop`, slot by slot; the number that count, or why not. */
static int64_t NAME(pass)(const struct job *job)
{
    int64_t features = job->features, block = BLOCK_BYTES / (features * (int64_t)sizeof(REAL) + 1), counted = 0;
    int height = block > BLOCK ? BLOCK : block < 4 ? 4 : (int)block, channels = job->pivot != NULL, kept = 0;
    REAL *work = malloc((size_t)(height + 3) * features * sizeof(REAL) + 1);
    const REAL *rows[BLOCK];
    if (work == NULL)
        return NO_MEMORY;
    for (int64_t row = job->start; row < job->stop; row++) {
        int64_t slot = row / job->slot, last = row + 1 == job->stop || (row + 1) % job->slot == 0;
        if (counts(job, row)) {
            rows[kept] = NAME(measure)(job, row, work + (3 + kept) * features, work);
            if (rows[kept] == NULL) {
                counted = NOT_FINITE;
                break;
            }
            kept++, counted++;
        } else
            for (int64_t number = 0; number < ROW_NUMBERS * (job->count - 1); number++)
                ((REAL *)job->by_row[number])[row] = NAN;
        if (kept == height || (last && kept)) {
            if (channels)
                NAME(channels)(rows, kept, job, job->sums + job->span * POWERS * features,
                               (REAL *)job->extremes + slot * 2 * features, row + 1);
            kept = 0;
        }
    }
    free(work);
    return counted;
}

/* How many values of each channel are further than OUTLIER standard deviations from its mean: only of slots that hold one. */
static void NAME(outliers)(const struct job *job, const double *mean, const double *limit, double *far, int64_t *chosen,
                           REAL *buffer)
{
    int64_t features = job->features;
    for (int64_t from = 0; from < job->rows; from += job->slot) {
        const REAL *high = (REAL *)job->extremes + from / job->slot * 2 * features, *low = high + features;
        int64_t many = 0, to = from + job->slot < job->rows ? from + job->slot : job->rows;
        for (int64_t i = 0; i < features; i++)
            if (high[i] - mean[i] > limit[i] || mean[i] - low[i] > limit[i])
                chosen[many++] = i;
        for (int64_t row = from; many && row < to; row++) {
            if (!counts(job, row))
                continue;
            const REAL *y = NAME(after)(job, row, buffer);
            for (int64_t k = 0; k < many; k++)
                far[chosen[k]] += fabs(y[chosen[k]] - mean[chosen[k]]) > limit[chosen[k]];
        }
    }
}

/* The numbers of every channel from the sums of all spans: mean, variance, largest magnitude, kurtosis, zeros, outliers. */
static int64_t NAME(end)(const struct job *job, double *work)
{
    int64_t features = job->features, slots = (job->rows + job->slot - 1) / job->slot;
    const REAL *pivot = job->pivot, *per_unit = pivot + features, *extremes = job->extremes;
    REAL *const *found = (REAL *const *)job->by_channel;
    double count = job->counted, *mean = work, *limit = work + features, *far = work + 2 * features;
    for (int64_t i = 0; i < features; i++) {
        double sums[POWERS] = {0}, high = -INFINITY, low = INFINITY;
        for (int64_t span = 0; span < job->spans; span++)
            for (int power = 0; power < POWERS; power++)
                sums[power] += job->sums[(span * POWERS + power) * features + i] / count;
        for (int64_t slot = 0; slot < slots; slot++) {
            REAL top = extremes[slot * 2 * features + i], bottom = extremes[(slot * 2 + 1) * features + i];
            high = top > high ? top : high, low = bottom < low ? bottom : low;
        }
        if (!isfinite(sums[1]) || !isfinite(sums[2]) || !isfinite(sums[3]) || !isfinite(sums[4]))
            return NOT_FINITE;
        double one = sums[1], square = one * one, unit = 1 / per_unit[i];
        double variance = high == low || sums[2] < square ? 0 : sums[2] - square;
        double fourth = sums[4] - 4 * one * sums[3] + 6 * square * sums[2] - 3 * square * square;
        mean[i] = pivot[i] + one * unit, limit[i] = OUTLIER * sqrt(variance) * unit, far[i] = 0;
        found[0][i] = mean[i], found[1][i] = variance * unit * unit, found[2][i] = high > -low ? high : -low;
        found[3][i] = variance == 0 ? NAN : fourth / (variance * variance), found[4][i] = sums[0];
    }
    NAME(outliers)(job, mean, limit, far, (int64_t *)(work + 3 * features), (REAL *)(work + 4 * features));
    for (int64_t i = 0; i < features; i++)
        found[5][i] = far[i] / count;
    return job->counted;
}
