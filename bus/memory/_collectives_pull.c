/* The steps of dispatch/combine that move rows: routing, staging, pulling, weighted addition.
 *
 * Nothing read from a peer is trusted: counts, offsets and row numbers are copied once, then checked, then used.
 */
#include "_collectives_exchange.h"

/* Counting sort of the (token, slot) pairs by expert; source order stays within an expert.
 *
 * Fills starts[num_experts + 1] and position[num_slots] (-1: no expert), and pair_row[number of pairs]. `next` is
 * scratch of num_experts. Returns the number of pairs, or -1 for an expert id out of range. */
Py_ssize_t
route_pairs(const int32_t *topk_idx, Py_ssize_t num_slots, Py_ssize_t top_k, Py_ssize_t num_experts, int32_t *next,
            int32_t *position, int32_t *starts, int32_t *pair_row)
{
    memset(next, 0, (size_t)num_experts * sizeof *next);
    for (Py_ssize_t i = 0; i < num_slots; i++) {
        if (topk_idx[i] < -1 || topk_idx[i] >= num_experts) {
            return -1;
        }
        if (topk_idx[i] >= 0) {
            next[topk_idx[i]]++;
        }
    }
    int32_t running = 0;
    for (Py_ssize_t e = 0; e < num_experts; e++) {
        int32_t count = next[e];
        starts[e] = next[e] = running;
        running += count;
    }
    starts[num_experts] = running;
    Py_ssize_t i = 0;
    for (int32_t row = 0; i < num_slots; row++) {
        for (Py_ssize_t k = 0; k < top_k; k++, i++) {
            int32_t expert = topk_idx[i];
            position[i] = expert < 0 ? -1 : next[expert]++;
            if (expert >= 0) {
                pair_row[position[i]] = row;
            }
        }
    }
    return running;
}

void
exchange_put_rows(const Exchange *self, char *rows, float *scales, const float *src, Py_ssize_t num_rows)
{
    if (self->int8) {
        for (Py_ssize_t i = 0; i < num_rows; i++) {
            scales[i] = quantise_row((int8_t *)rows + i * self->hidden, src + i * self->hidden, self->hidden);
        }
    }
    else if ((const char *)src != rows) { /* else it was written in place */
        copy_bytes(rows, (const char *)src, num_rows * self->row_bytes);
    }
}

/* Sort the batch's pairs and put rows, starts and pair rows into the own block. -1: an expert id is out of range. */
int
exchange_stage(Exchange *self, Py_ssize_t microbatch, const float *x)
{
    batch_t *batch = &self->batches[microbatch];
    char *block = block_of(self, self->group.rank, microbatch);
    int32_t *pair_row = (int32_t *)(block + self->pair_row_at);
    if (route_pairs(batch->topk, batch->num_tokens * self->top_k, self->top_k, self->num_experts, self->scratch,
                    batch->position, batch->starts, pair_row) < 0) {
        return -1;
    }
    memcpy(block + self->starts_at, batch->starts, (size_t)(self->num_experts + 1) * sizeof *batch->starts);
    exchange_put_rows(self, block + self->x_at, (float *)(block + self->x_scale_at), x, batch->num_tokens);
    return 0;
}

/* ---------------------------------------------------------------- dispatch */

/* Copy the slice of `rank`'s expert starts that concerns this rank and check it against the counts in its cell.
 * Returns 0, or -1 when they contradict each other or the shape. */
static int
read_starts(Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch, const uint64_t *found)
{
    Py_ssize_t num_local = self->num_local;
    uint64_t first = found[0] >> 32, count = found[0] & UINT32_MAX;
    if (found[1] > (uint64_t)self->max_tokens || first + count > found[1] * (uint64_t)self->top_k) {
        return -1;
    }
    const int32_t *shared = (const int32_t *)(block_of(self, rank, microbatch) + self->starts_at);
    int32_t *starts = self->scratch + rank * (num_local + 1);
    if (count == 0) { /* its block must not be read: it owes nothing and may be staging the next exchange already */
        memset(starts, 0, (size_t)(num_local + 1) * sizeof *starts);
        return 0;
    }
    for (Py_ssize_t e = 0; e <= num_local; e++) {
        starts[e] = load_count(&shared[self->group.rank * num_local + e]);
        if (e > 0 && starts[e] < starts[e - 1]) {
            return -1;
        }
    }
    return (uint64_t)starts[0] == first && (uint64_t)starts[num_local] == first + count ? 0 : -1;
}

/* Give every (local expert, source) its place among the rows that come; returns how many come. */
static Py_ssize_t
place_rows(Exchange *self, Py_ssize_t microbatch)
{
    Py_ssize_t num_local = self->num_local, done = 0;
    int32_t *y_start = (int32_t *)(block_of(self, self->group.rank, microbatch) + self->y_start_at);
    for (Py_ssize_t e = 0; e < num_local; e++) {
        Py_ssize_t before = done;
        for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
            const int32_t *starts = self->scratch + r * (num_local + 1) + e;
            self->row_at[r * num_local + e] = y_start[r * num_local + e] = (int32_t)done;
            done += starts[1] - starts[0];
        }
        self->batches[microbatch].counts[e] = (int32_t)(done - before);
    }
    return done;
}

/* Pull one source's rows. -1 when a row number is impossible. */
static int
pull_rank(const Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch)
{
    const batch_t *batch = &self->batches[microbatch];
    const char *block = block_of(self, rank, microbatch);
    const int32_t *pair_row = (const int32_t *)(block + self->pair_row_at);
    const float *scales = (const float *)(block + self->x_scale_at);
    uint64_t num_rows = batch->found[2 * rank + 1];
    Py_ssize_t out_bytes = self->delivers_int8 ? self->row_bytes : 4 * self->hidden;
    for (Py_ssize_t e = 0; e < self->num_local; e++) {
        const int32_t *starts = self->scratch + rank * (self->num_local + 1) + e;
        Py_ssize_t place = self->row_at[rank * self->num_local + e];
        char *out = (char *)batch->rows.buf + place * out_bytes;
        for (int32_t p = starts[0]; p < starts[1]; p++, place++, out += out_bytes) {
            int32_t row = load_count(&pair_row[p]);
            if (row < 0 || (uint64_t)row >= num_rows) {
                return -1;
            }
            const char *src = block + self->x_at + row * self->row_bytes;
            if (self->int8 && !self->delivers_int8) {
                dequantise_row((float *)out, (const int8_t *)src, scales[row], self->hidden);
                continue;
            }
            copy_row(out, src, self->row_bytes);
            if (self->delivers_int8) {
                ((float *)batch->scales.buf)[place] = scales[row];
            }
        }
    }
    return 0;
}

/* Pull what all ranks announced; returns the number of rows, or -1 - rank whose words are impossible. */
Py_ssize_t
exchange_pull(Exchange *self, Py_ssize_t microbatch)
{
    batch_t *batch = &self->batches[microbatch];
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        if (read_starts(self, r, microbatch, &batch->found[2 * r]) < 0) {
            return -1 - r;
        }
    }
    batch->num_pairs = place_rows(self, microbatch);
    for (Py_ssize_t i = 0; i < self->group.num_ranks; i++) { /* staggered, so that not all read one source at once */
        Py_ssize_t r = group_other(&self->group, i);
        if (pull_rank(self, r, microbatch) < 0) {
            return -1 - r;
        }
    }
    return batch->num_pairs;
}

/* ---------------------------------------------------------------- combine */

/* Where each expert's rows for this rank begin in its owner's y, into self->scratch. -1, or a corrupt rank. */
static Py_ssize_t
read_y_starts(Exchange *self, Py_ssize_t microbatch)
{
    const batch_t *batch = &self->batches[microbatch];
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        const int32_t *starts = batch->starts + r * self->num_local;
        int32_t asked = starts[self->num_local] - starts[0];
        if (r != self->group.rank && asked != 0 && batch->found[2 * r] != (uint64_t)asked) {
            return r;
        }
        const int32_t *shared = (const int32_t *)(block_of(self, r, microbatch) + self->y_start_at);
        for (Py_ssize_t e = 0; e < self->num_local; e++) {
            int32_t count = starts[e + 1] - starts[e];
            int32_t begin = count > 0 ? load_count(&shared[self->group.rank * self->num_local + e]) : 0;
            if (begin < 0 || begin > self->pairs_max - count) {
                return r;
            }
            self->scratch[r * self->num_local + e] = begin;
        }
    }
    return -1;
}

/* Find the rows of a token's slots; returns how many there are. */
static int
find_slots(const Exchange *self, Py_ssize_t microbatch, Py_ssize_t token, const float *weights, const char **rows,
           float *scales, float *factors)
{
    const batch_t *batch = &self->batches[microbatch];
    int num = 0;
    for (Py_ssize_t i = token * self->top_k; i < (token + 1) * self->top_k; i++) {
        int32_t expert = batch->topk[i];
        if (expert < 0) {
            continue;
        }
        const char *block = block_of(self, expert / self->num_local, microbatch);
        Py_ssize_t row = (Py_ssize_t)self->scratch[expert] + batch->position[i] - batch->starts[expert];
        rows[num] = block + self->y_at + row * self->row_bytes;
        scales[num] = self->int8 ? ((const float *)(block + self->y_scale_at))[row] : 1.0f;
        factors[num++] = weights[i];
    }
    return num;
}

/* Add the slots of every token, straight from their owners' y. -1, or the rank whose words are impossible. */
Py_ssize_t
exchange_reduce(Exchange *self, Py_ssize_t microbatch, const float *weights, float *out)
{
    Py_ssize_t corrupt = read_y_starts(self, microbatch);
    Py_ssize_t num_tokens = corrupt < 0 ? self->batches[microbatch].num_tokens : 0;
    for (Py_ssize_t t = 0; t < num_tokens; t++, out += self->hidden) {
        const char *rows[TOP_K_MAX];
        float scales[TOP_K_MAX], factors[TOP_K_MAX];
        int num = find_slots(self, microbatch, t, weights, rows, scales, factors);
        if (self->int8) {
            add_slots_int8(out, (const int8_t *const *)rows, scales, factors, num, self->hidden);
        }
        else {
            add_slots(out, (const float *const *)rows, factors, num, self->hidden);
        }
    }
    return corrupt;
}
