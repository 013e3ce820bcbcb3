/* AdamW on rows in C: what reference.py and hoisted.py do, for float32 on one CPU thread.

   Operations, their order and their roundings are those of torch's kernels: lerp and addcmul end in a fused
   multiply-add, addcdiv does not, scalars are rounded to float32 first, and square roots are taken by the function
   that torch takes them with (MKL's differ from sqrtf in the last bit of one value in 150).

   Shapes: R table rows, D width, U rows given, T steps remembered, B rows or steps whose roots are taken together.
   values, mean and square are [R, D]; last and moment [R] are the steps up to which a row's values and moments are
   done, but at least `floor`; touched [R]: it ever had a gradient. roots is scratch of B * D values. */
#include <math.h>
#include <stdint.h>

enum {
    AHEAD = 8,                        /* rows prefetched before they are needed, */
    NEAR = 256,                       /* values of each; the CPU prefetches the rest itself */
    POWERS = 256,                     /* gaps up to which powers of the betas are tabulated */
    MKL_MODE = 0x2 | 0x100 | 0x140000, /* high accuracy, no error handling, subnormal numbers kept */
};

/* MKL's vmsSqrt, or null where torch has no MKL and takes IEEE's square root. */
typedef void SquareRoot(int count, const float *of, float *root, int64_t mode);

typedef struct {
    float *values, *mean, *square;
    int32_t *last, *moment;
    uint8_t *touched;
    int64_t floor, width;
} State;

/* AdamW's constants, and [4, length]: size, root, sum of log decay, and decay, of the steps from `start` to `now`. */
typedef struct {
    double beta1, beta2, eps, factor1, factor2;
    const double *history;
    int64_t length, start, now;
} History;

/* The scalars of one step, as torch's kernels round them. */
typedef struct {
    float decay, weight, beta2, rest2, root, eps, size;
} Step;

static Step step_at(const History *history, int64_t step)
{
    const double *at = history->history + (step - history->start);
    return (Step){
        .decay = (float)at[3 * history->length],
        .weight = (float)(1 - history->beta1),
        .beta2 = (float)history->beta2,
        .rest2 = (float)(1 - history->beta2),
        .root = (float)at[history->length],
        .eps = (float)history->eps,
        .size = (float)-at[0],
    };
}

static float lerp(float from, float to, float weight)
{
    return weight < 0.5f ? fmaf(weight, to - from, from) : fmaf(weight - 1.0f, to - from, to);
}

/* v = v * beta2 + rest2 * g * g, also to `roots`. */
static void take_square(float *restrict v, const float *restrict g, float *restrict roots, int64_t width, Step step)
{
    for (int64_t d = 0; d < width; d++)
        roots[d] = v[d] = fmaf(step.rest2 * g[d], g[d], v[d] * step.beta2);
}

static void take_roots(SquareRoot *torch_sqrt, float *roots, int64_t count)
{
    if (torch_sqrt)
        torch_sqrt((int)count, roots, roots, MKL_MODE);
    else
        for (int64_t d = 0; d < count; d++)
            roots[d] = sqrtf(roots[d]);
}

/* m.lerp_(g, weight); p = p * decay + size * m / (roots / root + eps). */
static void descend(float *restrict p, float *restrict m, const float *restrict g, const float *restrict roots,
                    int64_t width, Step step)
{
    if (step.root == 1.0f)
        for (int64_t d = 0; d < width; d++) {
            m[d] = lerp(m[d], g[d], step.weight);
            p[d] = p[d] * step.decay + step.size * m[d] / (roots[d] + step.eps);
        }
    else
        for (int64_t d = 0; d < width; d++) {
            m[d] = lerp(m[d], g[d], step.weight);
            p[d] = p[d] * step.decay + step.size * m[d] / (roots[d] / step.root + step.eps);
        }
}

static void scale(float *x, float factor, int64_t width)
{
    for (int64_t d = 0; d < width; d++)
        x[d] *= factor;
}

static void prefetch(const State *state, int64_t row)
{
    for (int64_t d = 0; d < state->width && d < NEAR; d += 16) {
        __builtin_prefetch(state->values + row * state->width + d, 1);
        __builtin_prefetch(state->mean + row * state->width + d, 1);
        __builtin_prefetch(state->square + row * state->width + d, 1);
    }
}

static int64_t done(const State *state, const int32_t *steps, int64_t row)
{
    return steps[row] > state->floor ? steps[row] : state->floor;
}

static void decay_moments(const State *state, int64_t row, float factor1, float factor2)
{
    scale(state->mean + row * state->width, factor1, state->width);
    scale(state->square + row * state->width, factor2, state->width);
}

/* The latest step, on rows that have gradients; their values are done up to the step before, their moments perhaps
   not: a step without gradient leaves factor1 and factor2 of them. */
int64_t update(State *state, const History *history, SquareRoot *torch_sqrt, float *roots, int64_t block,
               const int64_t *rows, const float *grads, int64_t count)
{
    Step step = step_at(history, history->now);
    int64_t width = state->width;
    float factors[2][POWERS];
    for (int gap = 0; gap < POWERS; gap++) {
        factors[0][gap] = (float)pow(history->factor1, gap);
        factors[1][gap] = (float)pow(history->factor2, gap);
    }
    for (int64_t low = 0; low < count; low += block) {
        int64_t high = low + block < count ? low + block : count;
        for (int64_t u = low; u < high; u++) {
            if (u + AHEAD < count)
                prefetch(state, rows[u + AHEAD]);
            int64_t at = rows[u] * width, gap = history->now - 1 - done(state, state->moment, rows[u]);
            if (gap > 0 && gap < POWERS)
                decay_moments(state, rows[u], factors[0][gap], factors[1][gap]);
            else if (gap > 0)
                decay_moments(state, rows[u], (float)pow(history->factor1, gap), (float)pow(history->factor2, gap));
            take_square(state->square + at, grads + u * width, roots + (u - low) * width, width, step);
        }
        take_roots(torch_sqrt, roots, (high - low) * width);
        for (int64_t u = low; u < high; u++) {
            int64_t row = rows[u], at = row * width;
            descend(state->values + at, state->mean + at, grads + u * width, roots + (u - low) * width, width, step);
            state->last[row] = state->moment[row] = (int32_t)history->now;
            state->touched[row] = 1;
        }
    }
    return 0;
}

/* The latest step on all `table_rows` rows; those not among `rows` (ascending) have the gradient `zeros` [D]. */
int64_t sweep(State *state, const History *history, SquareRoot *torch_sqrt, float *roots, int64_t block,
              const int64_t *rows, const float *grads, int64_t count, const float *zeros, int64_t table_rows)
{
    Step step = step_at(history, history->now);
    int64_t width = state->width;
    for (int64_t low = 0, first = 0; low < table_rows; low += block) {
        int64_t high = low + block < table_rows ? low + block : table_rows, u = first;
        for (int64_t row = low; row < high; row++) {
            const float *gradient = u < count && rows[u] == row ? grads + u++ * width : zeros;
            take_square(state->square + row * width, gradient, roots + (row - low) * width, width, step);
        }
        take_roots(torch_sqrt, roots, (high - low) * width);
        u = first;
        for (int64_t row = low; row < high; row++) {
            int64_t at = row * width, read = u < count && rows[u] == row;
            const float *gradient = read ? grads + u++ * width : zeros;
            descend(state->values + at, state->mean + at, gradient, roots + (row - low) * width, width, step);
            state->touched[row] |= read;
        }
        first = u;
    }
    return 0;
}

/* Every step that rows have missed, with the gradient `zeros` [D], the roots of `block` steps together. */
int64_t replay_every(State *state, const History *history, SquareRoot *torch_sqrt, float *roots, int64_t block,
                     const int64_t *rows, int64_t count, const float *zeros)
{
    int64_t width = state->width, now = history->now;
    for (int64_t u = 0; u < count; u++) {
        if (u + AHEAD < count)
            prefetch(state, rows[u + AHEAD]);
        int64_t row = rows[u], step = done(state, state->last, row) + 1;
        float *p = state->values + row * width, *m = state->mean + row * width, *v = state->square + row * width;
        state->last[row] = state->moment[row] = (int32_t)now;
        if (!state->touched[row])
            for (; step <= now; step++)
                scale(p, step_at(history, step).decay, width);
        for (; step <= now; step += block) {
            int64_t steps = now - step + 1 < block ? now - step + 1 : block;
            for (int64_t s = 0; s < steps; s++)
                take_square(v, zeros, roots + s * width, width, step_at(history, step + s));
            take_roots(torch_sqrt, roots, steps * width);
            for (int64_t s = 0; s < steps; s++)
                descend(p, m, zeros, roots + s * width, width, step_at(history, step + s));
        }
    }
    return 0;
}

/* As hoisted.py, roots [D]: at most `limit` missed updates of a row, then decay alone. Without `moments`, those are
   left for `update`. */
int64_t replay_hoisted(State *state, const History *history, float *roots, const int64_t *rows, int64_t count,
                       int64_t limit, int64_t moments)
{
    int64_t width = state->width, now = history->now, start = history->start;
    const double *size = history->history, *root = size + history->length, *log_decay = root + history->length,
                 *decay = log_decay + history->length;
    double factor1 = history->factor1, factor2 = history->factor2, root_factor2 = sqrt(factor2);
    float eps = (float)history->eps;
    for (int64_t u = 0; u < count; u++) {
        if (u + AHEAD < count)
            prefetch(state, rows[u + AHEAD]);
        int64_t row = rows[u], last = done(state, state->last, row), moment = done(state, state->moment, row);
        float *restrict p = state->values + row * width;
        const float *restrict m = state->mean + row * width, *restrict v = state->square + row * width;
        if (last == now && !moments)
            continue;
        double decays = exp(log_decay[now - start] - log_decay[last - start]), power1 = 1, power2 = 1;
        scale(p, (float)decays, width);
        state->last[row] = (int32_t)now;
        if (!state->touched[row])
            continue;
        if (moment < last)
            decay_moments(state, row, (float)pow(factor1, last - moment), (float)pow(factor2, last - moment));
        for (int64_t d = 0; d < width; d++)
            roots[d] = sqrtf(v[d]);
        for (int64_t step = last + 1; step <= now && step <= last + limit; step++) {
            decays /= (float)decay[step - start];
            power1 *= factor1;
            power2 *= root_factor2;
            float factor = (float)(size[step - start] * decays * power1);
            float rescale = (float)(power2 / root[step - start]);
            for (int64_t d = 0; d < width; d++)
                p[d] -= factor * m[d] / fmaf(rescale, roots[d], eps);
        }
        state->moment[row] = (int32_t)last;
        if (moments) {
            decay_moments(state, row, (float)pow(factor1, now - last), (float)pow(factor2, now - last));
            state->moment[row] = (int32_t)now;
        }
    }
    return 0;
}
