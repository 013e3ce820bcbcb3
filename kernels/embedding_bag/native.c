/* Dots of table rows, and lookups sorted by row, in C: parts of what reference.py does, on one CPU thread.

   Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups, U unique rows. */
#include <stdint.h>
#include <string.h>

enum {
    AHEAD = 8,       /* rows prefetched before they are needed */
    NEAR = 256,      /* values of each; the CPU prefetches the rest itself */
    LANES = 16,      /* partial sums of a dot product */
    DIGIT_BITS = 11, /* of a radix sort: the counts of all digits fill half of a first-level cache */
};

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

static void prefetch(const float *row, int64_t width)
{
    for (int64_t d = 0; d < width && d < NEAR; d += 16)
        __builtin_prefetch(row + d);
}

/* The place of the first index outside [0, rows), or -1. */
static int64_t first_outside(const int64_t *indices, int64_t lookups, int64_t rows)
{
    int64_t outside = 0;
    for (int64_t l = 0; l < lookups; l++)
        outside += (uint64_t)indices[l] >= (uint64_t)rows;
    if (outside)
        for (int64_t l = 0; l < lookups; l++)
            if ((uint64_t)indices[l] >= (uint64_t)rows)
                return l;
    return -1;
}

static float dot(const float *a, const float *b, int64_t width)
{
    lanes sums = {0}, x, y;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        memcpy(&x, a + d, sizeof x);
        memcpy(&y, b + d, sizeof y);
        sums += x * y;
    }
    for (int i = 0; d + i < width; i++)
        sums[i] += a[d + i] * b[d + i];
    float sum[LANES];
    memcpy(sum, &sums, sizeof sum);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            sum[i] += sum[i + half];
    return sum[0];
}

/* dots_NS[n, s] = <table[indices[n, s]], x[n]>. Returns -1, or the place of an index that is out of range. */
int64_t dots(const float *table, const int64_t *indices, const float *x, float *out, int64_t bags, int64_t size,
             int64_t rows, int64_t width)
{
    int64_t lookups = bags * size, outside = first_outside(indices, lookups, rows);
    if (outside >= 0)
        return outside;
    for (int64_t l = 0, n = 0; n < bags; n++)
        for (int64_t s = 0; s < size; s++, l++) {
            if (l + AHEAD < lookups)
                prefetch(table + indices[l + AHEAD] * width, width);
            out[l] = dot(table + indices[l] * width, x + n * width, width);
        }
    return -1;
}

static int bits_of(uint64_t value)
{
    return value ? 64 - __builtin_clzll(value) : 0;
}

/* One stable pass of a radix sort: the values of `from` by `bits` bits from `low` up, into `to`. */
static void sort_by_digit(const uint64_t *from, uint64_t *to, int64_t count, int low, int bits)
{
    int64_t place[1 << DIGIT_BITS] = {0};
    uint64_t mask = (1ull << bits) - 1;
    for (int64_t l = 0; l < count; l++)
        place[from[l] >> low & mask]++;
    int64_t before = 0;
    for (uint64_t digit = 0; digit <= mask; digit++) {
        int64_t here = place[digit];
        place[digit] = before;
        before += here;
    }
    for (int64_t l = 0; l < count; l++)
        to[place[from[l] >> low & mask]++] = from[l];
}

/* Lookups by row: sorted_L holds row << shift | lookup in ascending order, shift being the bits of L; other_L is
   scratch. Returns the number of unique rows; -1 - l for an index l that is out of range. */
int64_t sort_by_row(const int64_t *indices, uint64_t *sorted, uint64_t *other, int64_t lookups, int64_t rows)
{
    int64_t outside = first_outside(indices, lookups, rows);
    if (outside >= 0)
        return -1 - outside;
    if (!lookups)
        return 0;
    int shift = bits_of(lookups), row_bits = bits_of(rows - 1);
    int passes = (row_bits + DIGIT_BITS - 1) / DIGIT_BITS;
    uint64_t *from = passes % 2 ? other : sorted, *to = passes % 2 ? sorted : other;
    for (int64_t l = 0; l < lookups; l++)
        from[l] = (uint64_t)indices[l] << shift | l;
    for (int pass = 0; pass < passes; pass++) {
        int low = row_bits * pass / passes, high = row_bits * (pass + 1) / passes;
        sort_by_digit(from, to, lookups, shift + low, high - low);
        uint64_t *swap = from;
        from = to, to = swap;
    }
    int64_t unique = 1;
    for (int64_t l = 1; l < lookups; l++)
        unique += sorted[l] >> shift != sorted[l - 1] >> shift;
    return unique;
}

/* What sort_by_row left as rows_U, where each row's lookups start, and, in place, the lookups themselves. */
int64_t split_sorted(uint64_t *sorted, int64_t *rows, int64_t *offsets, int64_t lookups)
{
    int shift = bits_of(lookups);
    int64_t unique = 0;
    uint64_t before = ~0ull;
    for (int64_t l = 0; l < lookups; l++) {
        uint64_t row = sorted[l] >> shift;
        if (row != before) {
            rows[unique] = row;
            offsets[unique++] = l;
            before = row;
        }
        sorted[l] &= (1ull << shift) - 1;
    }
    return unique;
}
