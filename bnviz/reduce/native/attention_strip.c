/* Every statistic of `attention_stats` from the logits of one strip of rows, in three sweeps of a row that stays in the first
 * cache: its largest, exponentials and their sums, and what they add to each key, for a few rows at a time.
 *
 * Plain C for any compiler with vector extensions; `_attention_native.py` fills `struct job`, whose logits are overwritten.
 * A row whose sum is not finite ends the pass: the caller then takes the plain one.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define REAL float
#define INT int32_t
#define NAME(x) x
#define INTEL(x) _mm512_##x##_ps
#include "vector.h"

enum { TOGETHER = 4, PIECE = 2048 }; /* rows whose shares are added at once; values summed in float */
enum { ALL_FINITE, NOT_FINITE };
#define FLOOR (-32.0f)     /* smaller shares are held there: subnormal numbers would begin at their squares */
#define MARGIN 1e-4f       /* a row that is uniform up to rounding has no pivotal key */

struct job {
    float *logits;            /* (heads, rows, columns) */
    int64_t heads, rows, columns;
    int64_t head, first, start; /* of the first of each: its head, its query, its key */
    int64_t queries, keys, causal, window; /* window 0: none */
    const uint8_t *keep;      /* (queries,) rows that count; NULL: all */
    const uint8_t *allowed;   /* (heads, queries, keys) which keys are seen; NULL: all in reach */
    int64_t of_head, of_row;  /* bytes from one to the next of those */
    const float *sinks;       /* (heads,) */
    float *mass, *mass_squared, *peak, *pivotal, *window_mass, *last_row;            /* (heads, keys) */
    float *recent_mass, *recent_pivotal, *ranged_mass;
    float *entropy, *sink_mass, *local_mass, *single[3];                             /* (heads, queries) */
    float *pooled;            /* (heads, bins, bins) */
    const int64_t *partner;   /* (queries, singles) the key of each single share, negative: none */
    const uint8_t *window_rows, *last_rows; /* (queries,); NULL: the last `snap`, and the last */
    const float *position;    /* (queries,) what rows of ranged_mass count for */
    int64_t singles, snap, recent, sink, first_key, local, bins, tall, wide;
    float *work;              /* (columns,) */
};

struct row {
    float *e;                 /* exponentials, by column */
    int64_t low, high;        /* columns it sees */
    float inverse, limit;     /* 1 / their sum, and the share beyond which a key is pivotal */
};

/* e^x for FLOOR <= x <= 0, to two units in the last place: a power of two times a polynomial over half an octave each way. */
static inline vec exponential(vec x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, which lies in the lowest bits */
    vec shifted = x * 1.44269504088896341f + magic, whole = shifted - magic;
    vec r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vec p = r * 0.00139337289147079f + 0.008363235741853714f;
    p = p * r + 0.041666463017463684f;
    p = p * r + 0.16666576266288757f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    mask power = ((mask)shifted - (mask)((vec){0} + magic)) << 23;
    return (vec)((mask)p + power);
}

/* The last values of a row, `none` behind them. */
static inline vec load_some(const float *from, int64_t count, float none)
{
    vec values = (vec){0} + none;
    memcpy(&values, from, count * sizeof *from);
    return values;
}

static float largest(const float *s, int64_t count)
{
    vec top = (vec){0} - INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        top = greater(load(s + i), top);
    if (i < count)
        top = greater(load_some(s + i, count - i, -INFINITY), top);
    float found = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        found = top[lane] > found ? top[lane] : found;
    return found;
}

/* Exponentials in place of at most PIECE logits, 0 in place of -infinity; their sum, and the sum of each times its logit. A function
 * of its own: inlined, gcc 12 keeps sums that are taken apart later in memory. */
static __attribute__((noinline)) void exponentials(float *s, int64_t count, float shift, wide found[2])
{
    vec sums = {0}, withs = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t some = count - i < LANES ? count - i : LANES;
        vec x = (some < LANES ? load_some(s + i, some, -INFINITY) : load(s + i)) - shift;
        mask counts = x != -INFINITY;
        x = pick(x < FLOOR, (vec){0} + FLOOR, x);
        vec e = (vec)((mask)exponential(x) & counts);
        sums += e;
        withs += e * x;
        if (some < LANES)
            memcpy(s + i, &e, some * sizeof *s);
        else
            store(s + i, e);
    }
    found[0] += folded(sums), found[1] += folded(withs);
}

/* Shares of a few rows, added to what each key of [low, high) has gathered. Rows hold zeros where they see nothing. */
static void gather(const struct job *job, const struct row *rows, int count, int64_t head, int64_t low, int64_t high, int recent)
{
    int64_t at = head * job->keys + job->start;
    float *lately = recent && job->recent_mass ? job->recent_mass + at : NULL;
    float *turns = recent && job->recent_pivotal ? job->recent_pivotal + at : NULL;
    float *mass = job->work, *squared = job->mass_squared ? job->mass_squared + at : NULL;
    float *peak = job->peak ? job->peak + at : NULL, *pivotal = job->pivotal ? job->pivotal + at : NULL;
    const vec none = {0}, one = none + 1;
    for (int64_t i = low; i < high; i += LANES) {
        int64_t some = high - i < LANES ? high - i : LANES;
        vec masses = none, squares = none, peaks = none, pivots = none;
        for (int k = 0; k < count; k++) {
            vec p = (some < LANES ? load_some(rows[k].e + i, some, 0) : load(rows[k].e + i)) * rows[k].inverse;
            masses += p;
            squares += p * p;
            peaks = greater(p, peaks);
            pivots += pick(p > rows[k].limit, one, none);
        }
        if (some == LANES) {
            store(mass + i, load(mass + i) + masses);
            if (squared)
                store(squared + i, load(squared + i) + squares);
            if (peak)
                store(peak + i, greater(peaks, load(peak + i)));
            if (pivotal)
                store(pivotal + i, load(pivotal + i) + pivots);
            if (lately)
                store(lately + i, load(lately + i) + masses);
            if (turns)
                store(turns + i, load(turns + i) + pivots);
        } else
            for (int lane = 0; lane < some; lane++) {
                mass[i + lane] += masses[lane];
                if (squared)
                    squared[i + lane] += squares[lane];
                if (peak)
                    peak[i + lane] = peaks[lane] > peak[i + lane] ? peaks[lane] : peak[i + lane];
                if (pivotal)
                    pivotal[i + lane] += pivots[lane];
                if (lately)
                    lately[i + lane] += masses[lane];
                if (turns)
                    turns[i + lane] += pivots[lane];
            }
    }
}

static double sum_of(const float *values, int64_t low, int64_t high)
{
    double sum = 0;
    for (int64_t i = low; i < high; i++)
        sum += values[i];
    return sum;
}

static void add_row(float *to, const struct row *row, float times)
{
    for (int64_t i = row->low; i < row->high; i++)
        to[i] += row->e[i] * row->inverse * times;
}

/* What one row says of itself, and what it adds to sums over a few rows alone. */
static void of_row(const struct job *job, const struct row *row, int64_t head, int64_t query)
{
    int64_t into = head * job->queries + query, position = query + job->keys - job->queries - job->start;
    if (job->sink_mass) {
        int64_t low = job->first_key - job->start, high = low + job->sink;
        low = low > row->low ? low : row->low, high = high < row->high ? high : row->high;
        job->sink_mass[into] = sum_of(row->e, low, high) * row->inverse;
    }
    if (job->local_mass) {
        int64_t low = position - job->local + 1, high = position + job->local;
        low = low > row->low ? low : row->low, high = high < row->high ? high : row->high;
        job->local_mass[into] = sum_of(row->e, low, high) * row->inverse;
    }
    for (int64_t which = 0; which < job->singles; which++) {
        int64_t column = job->partner[query * job->singles + which] - job->start;
        job->single[which][into] = column >= row->low && column < row->high ? row->e[column] * row->inverse : 0;
    }
    int64_t keys = head * job->keys + job->start;
    int watched = job->window_rows ? job->window_rows[query] : query >= job->queries - job->snap;
    if (job->window_mass && watched)
        add_row(job->window_mass + keys, row, 1);
    if (job->ranged_mass && watched)
        add_row(job->ranged_mass + keys, row, job->position[query]);
    if (job->last_row && (job->last_rows ? job->last_rows[query] : query == job->queries - 1))
        add_row(job->last_row + keys, row, 1);
}

/* The columns that a row may see. */
static void reach(const struct job *job, int64_t query, int64_t *low, int64_t *high)
{
    int64_t position = query + job->keys - job->queries, stop = job->keys;
    if (job->causal)
        stop = position + 1;
    else if (job->window)
        stop = position + job->window;
    *low = job->window ? position - job->window + 1 - job->start : -job->start;
    *high = (stop < job->keys ? stop : job->keys) - job->start;
    *low = *low > 0 ? *low : 0;
    *high = *high < job->columns ? *high : job->columns;
}

/* Exponentials and numbers of one row; 0: it sees nothing or does not count, -1: it is not finite. */
static int begin(const struct job *job, int64_t head, int64_t number, struct row *row)
{
    int64_t query = job->first + number, visible;
    row->e = job->logits + ((head - job->head) * job->rows + number) * job->columns;
    reach(job, query, &row->low, &row->high);
    visible = row->high - row->low;
    if (visible <= 0 || (job->keep && !job->keep[query]))
        return 0;
    const uint8_t *seen = job->allowed ? job->allowed + head * job->of_head + query * job->of_row : NULL;
    float *s = row->e + row->low;
    if (seen) {
        seen += job->start + row->low;
        visible = 0;
        for (int64_t i = 0; i < row->high - row->low; i++) {
            visible += seen[i] != 0;
            s[i] = seen[i] ? s[i] : -INFINITY;
        }
        if (visible == 0)
            return 0;
    }
    float shift = largest(s, row->high - row->low);
    if (job->sinks && job->sinks[head] > shift)
        shift = job->sinks[head];
    wide sums[2] = {{0}};
    for (int64_t piece = row->low; piece < row->high; piece += PIECE)
        exponentials(row->e + piece, row->high - piece < PIECE ? row->high - piece : PIECE, shift, sums);
    double sum = total(sums[0]), with = total(sums[1]), beside = 0;
    if (job->sinks)
        beside = exp((double)job->sinks[head] - shift);
    double whole = sum + beside;
    if (!isfinite(with) || !isfinite(whole))
        return -1;
    row->inverse = 1 / whole;
    row->limit = (1 + MARGIN) / visible;
    if (job->entropy) {
        double entropy = log(whole) * (sum / whole) - with / whole;
        job->entropy[head * job->queries + query] = entropy > 0 ? entropy : 0;
    }
    return 1;
}

/* Zeros where a row sees nothing but others of its group do. */
static void widen(struct row *row, int64_t low, int64_t high)
{
    for (int64_t i = low; i < row->low; i++)
        row->e[i] = 0;
    for (int64_t i = row->high > low ? row->high : low; i < high; i++)
        row->e[i] = 0;
}

/* The mass of one bin of queries goes to its keys and to its row of the map. */
static void flush(const struct job *job, int64_t head, int64_t bin, int64_t low, int64_t high)
{
    float *mass = job->mass ? job->mass + head * job->keys + job->start : NULL;
    float *map = job->pooled ? job->pooled + (head * job->bins + bin) * job->bins : NULL;
    for (int64_t i = low; mass && i < high; i++)
        mass[i] += job->work[i];
    for (int64_t i = low; map && i < high;) {
        int64_t key = job->start + i, end = (key / job->wide + 1) * job->wide - job->start;
        end = end < high ? end : high;
        map[key / job->wide] += sum_of(job->work, i, end);
        i = end;
    }
    for (int64_t i = low; i < high; i++)
        job->work[i] = 0;
}

int64_t attention_strip(const struct job *job)
{
    memset(job->work, 0, job->columns * sizeof *job->work);
    for (int64_t head = job->head; head < job->head + job->heads; head++) {
        int64_t from = job->columns, to = 0; /* columns that the bin at hand has reached */
        for (int64_t number = 0; number < job->rows;) {
            int64_t query = job->first + number, bin = query / job->tall, left = (bin + 1) * job->tall - query;
            int recent = query >= job->recent;
            left = !recent && job->recent - query < left ? job->recent - query : left;
            int64_t end = number + (left < TOGETHER ? left : TOGETHER), low = job->columns, high = 0;
            struct row rows[TOGETHER];
            int count = 0;
            for (end = end < job->rows ? end : job->rows; number < end; number++) {
                int state = begin(job, head, number, rows + count);
                if (state < 0)
                    return NOT_FINITE;
                if (state == 0)
                    continue;
                low = rows[count].low < low ? rows[count].low : low;
                high = rows[count].high > high ? rows[count].high : high;
                of_row(job, rows + count++, head, job->first + number);
            }
            for (int k = 0; k < count; k++)
                widen(rows + k, low, high);
            gather(job, rows, count, head, low, high, recent);
            from = low < from ? low : from, to = high > to ? high : to;
            if (number == job->rows || (job->first + number) % job->tall == 0) {
                flush(job, head, bin, from, to);
                from = job->columns, to = 0;
            }
        }
    }
    return ALL_FINITE;
}
