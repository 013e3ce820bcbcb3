/* The product-key search in C: what reference.py does with half scores, for float32 on one CPU thread.

   Shapes: N tokens, M heads, W half of a key's width, n half keys, K rows kept per head, P candidate pairs, C tokens of
   a chunk. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 8 };

typedef int32_t lanes __attribute__((vector_size(LANES * sizeof(int32_t))));

/* Memory for one selection: [count + LANES] each, and [groups]. */
typedef struct {
    int32_t *ranks, *found_ranks, *found_places, *maxima;
} Scratch;

/* Rises with the value: not a number counts as largest, and minus zero as zero. */
static int32_t rank_of(float value)
{
    int32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 & INT32_MAX);
}

/* A rank that at least top_k of the values reach, and few others: the top_k-th of the greatest ranks of as many groups
   as there are `maxima`, a multiple of LANES. */
static int32_t low_bound(const int32_t *ranks, int64_t count, int64_t top_k, int32_t *maxima, int64_t groups)
{
    memcpy(maxima, ranks, sizeof(int32_t) * groups);
    for (int64_t start = groups; start < count; start += groups) {
        int64_t length = count - start < groups ? count - start : groups;
        for (int64_t group = 0; group < length; group++)
            maxima[group] = ranks[start + group] > maxima[group] ? ranks[start + group] : maxima[group];
    }
    int32_t bound = INT32_MAX;
    for (int64_t group = 0; group < groups; group += LANES) {
        lanes maximum, above = {0};
        memcpy(&maximum, maxima + group, sizeof maximum);
        for (int64_t other = 0; other < groups; other++)
            above -= maxima[other] > maximum;
        for (int lane = 0; lane < LANES; lane++)
            bound = above[lane] < top_k && maximum[lane] < bound ? maximum[lane] : bound;
    }
    return bound;
}

/* Places of the top_k largest of `count` values, best first, the lower place first among equals; `places` has room for
   count + LANES. */
static void select_best(const float *values, int64_t count, int64_t top_k, int32_t *places, Scratch scratch)
{
    int32_t *ranks = scratch.ranks, *found = scratch.found_ranks, *restrict found_places = scratch.found_places;
    int32_t bound = INT32_MIN;
    int64_t groups = (2 * top_k + LANES - 1) / LANES * LANES, kept = 0;
    for (int64_t at = 0; at < count; at++)
        ranks[at] = rank_of(values[at]);
    if (count >= groups + top_k)
        bound = low_bound(ranks, count, top_k, scratch.maxima, groups);
    for (int64_t at = 0; at < count; at++) {
        found_places[kept] = (int32_t)at;
        kept += ranks[at] >= bound;
    }
    for (int64_t at = 0; at < kept; at++)
        found[at] = ranks[found_places[at]];
    for (int lane = 0; lane < LANES; lane++)
        found[kept + lane] = INT32_MIN;
    lanes place = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t start = 0; start < kept; start += LANES, place += LANES) {
        lanes rank, before = {0};
        memcpy(&rank, found + start, sizeof rank);
        for (int32_t other = 0; other < kept; other++)
            before -= (found[other] > rank) | ((found[other] == rank) & (other < place));
        for (int lane = 0; lane < LANES; lane++)
            places[before[lane]] = found_places[start + lane];
    }
}

/* The top_k of all n * n sums of a first and a second half score [M, 2, C, n]: rows i * n + j and their sums, both
   [C, M, K], best first. first and second [P] are the ranks of the pairs that can be among them. memory: room for
   7 * (max(n, P) + LANES) + 2 * K + LANES numbers. */
int64_t combine(const float *half_scores, const int32_t *first, const int32_t *second, int64_t *rows, float *scores,
                int64_t heads, int64_t tokens, int64_t half_keys, int64_t top_k, int64_t pairs, int32_t *memory)
{
    int64_t room = (half_keys > pairs ? half_keys : pairs) + LANES;
    Scratch scratch = {memory, memory + room, memory + 2 * room, memory + 7 * room};
    int32_t *ones = memory + 3 * room, *twos = memory + 4 * room, *chosen = memory + 5 * room;
    float *sums = (float *)(memory + 6 * room);
    for (int64_t at = 0; at < tokens * heads; at++) {
        int64_t token = at / heads, head = at % heads;
        const float *one = half_scores + (head * 2 * tokens + token) * half_keys, *two = one + tokens * half_keys;
        select_best(one, half_keys, top_k, ones, scratch);
        select_best(two, half_keys, top_k, twos, scratch);
        for (int64_t p = 0; p < pairs; p++)
            sums[p] = one[ones[first[p]]] + two[twos[second[p]]];
        select_best(sums, pairs, top_k, chosen, scratch);
        for (int64_t k = 0; k < top_k; k++) {
            rows[at * top_k + k] = ones[first[chosen[k]]] * half_keys + twos[second[chosen[k]]];
            scores[at * top_k + k] = sums[chosen[k]];
        }
    }
    return 0;
}

static void add_scaled(float *restrict sum, float weight, const float *restrict x, int64_t width)
{
    for (int64_t w = 0; w < width; w++)
        sum[w] = fmaf(weight, x[w], sum[w]);
}

/* Adds to the gradients of queries [N, M, 2, W] and keys [M, 2, n, W] those of the scores [N, M, K], token by token. */
int64_t search_backward(const float *grad, const int64_t *rows, const float *q, const float *keys, float *grad_q,
                        float *grad_keys, int64_t tokens, int64_t heads, int64_t half_keys, int64_t top_k,
                        int64_t width)
{
    for (int64_t at = 0; at < tokens * heads; at++) {
        int64_t head = at % heads * 2 * half_keys;
        for (int64_t k = 0; k < top_k; k++) {
            int64_t row = rows[at * top_k + k];
            int64_t halves[2] = {head + row / half_keys, head + half_keys + row % half_keys};
            for (int64_t half = 0; half < 2; half++) {
                int64_t query = (at * 2 + half) * width, key = halves[half] * width;
                add_scaled(grad_q + query, grad[at * top_k + k], keys + key, width);
                add_scaled(grad_keys + key, grad[at * top_k + k], q + query, width);
            }
        }
    }
    return 0;
}
