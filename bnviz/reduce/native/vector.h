/* Vectors of one type, as wide as a register; the compiler's own, so that no flag has to allow it to reorder sums.
 *
 * Includers define REAL, INT (as wide), NAME(x) and INTEL(x), a function of immintrin.h on 512 bits.
 */

#ifndef REGISTER
#if defined __AVX512F__
#include <immintrin.h>
#define REGISTER 64 /* bytes; gcc keeps vectors that are wider than a register in memory */
#elif defined __AVX__
#define REGISTER 32
#else
#define REGISTER 16
#endif
#define LANES (REGISTER / (int)sizeof(REAL))
#endif

typedef REAL NAME(vec) __attribute__((vector_size(LANES * sizeof(REAL))));
typedef REAL NAME(half) __attribute__((vector_size(LANES / 2 * sizeof(REAL))));
typedef double NAME(wide) __attribute__((vector_size(LANES / 2 * sizeof(double))));
typedef INT NAME(mask) __attribute__((vector_size(LANES * sizeof(REAL))));

static inline NAME(vec) NAME(load)(const REAL *from)
{
    NAME(vec) values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline void NAME(store)(REAL *to, NAME(vec) values)
{
    memcpy(to, &values, sizeof values);
}

static inline NAME(vec) NAME(pick)(NAME(mask) first, NAME(vec) a, NAME(vec) b)
{
    return (NAME(vec))(((NAME(mask))a & first) | ((NAME(mask))b & ~first));
}

/* The greater of two and the lesser, b where one is NaN. Written out, gcc 12 takes three instructions for one on 512 bits. */
static inline NAME(vec) NAME(greater)(NAME(vec) a, NAME(vec) b)
{
#ifdef __AVX512F__
    return INTEL(max)(a, b);
#else
    return NAME(pick)(a > b, a, b);
#endif
}

static inline NAME(vec) NAME(lesser)(NAME(vec) a, NAME(vec) b)
{
#ifdef __AVX512F__
    return INTEL(min)(a, b);
#else
    return NAME(pick)(a < b, a, b);
#endif
}

/* A vector's two halves in double, added. */
static inline NAME(wide) NAME(folded)(NAME(vec) values)
{
    NAME(half) halves[2];
    memcpy(halves, &values, sizeof halves);
    return __builtin_convertvector(halves[0], NAME(wide)) + __builtin_convertvector(halves[1], NAME(wide));
}

/* Their sum. */
static inline double NAME(total)(NAME(wide) sums)
{
    double lanes[LANES / 2], found[4] = {0}; /* one would wait for itself at every lane */
    memcpy(lanes, &sums, sizeof lanes);
    for (int lane = 0; lane < LANES / 2; lane++)
        found[lane % 4] += lanes[lane];
    return (found[0] + found[1]) + (found[2] + found[3]);
}

/* Values added to as many sums in double. */
static inline void NAME(add_to)(double *sums, NAME(vec) values)
{
    NAME(half) halves[2];
    memcpy(halves, &values, sizeof values);
    for (int half = 0; half < 2; half++) {
        NAME(wide) sum;
        memcpy(&sum, sums + half * (LANES / 2), sizeof sum);
        sum += __builtin_convertvector(halves[half], NAME(wide));
        memcpy(sums + half * (LANES / 2), &sum, sizeof sum);
    }
}

