/* What is done row by row: norm, activation, rotation, weighted sum, and the choice of experts. */
#include "_kernels.h"

/* x [R, H, D], weight [D], eps, out [R, H, D]. */
KERNEL(rms_norm)
{
    arguments args = {.function = "rms_norm"};
    array x, weight, out;
    if (!need_count(args.function, count, 4))
        return NULL;
    double eps = PyFloat_AsDouble(objects[2]);
    if (eps == -1.0 && PyErr_Occurred())
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY, ANY) && IN(1, weight, 'f', x.shape[2]) &&
             OUT(3, out, 'f', x.shape[0], x.shape[1], x.shape[2]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t r = 0; r < x.shape[0]; r++)
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            kernels->rms_norm(row_f32(&x, r, h), weight.data, (float)eps, (float *)row_f32(&out, r, h), x.shape[2]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* gate [R, N], up [R, N], out [R, N]. */
KERNEL(silu_mul)
{
    arguments args = {.function = "silu_mul"};
    array gate, up, out;
    if (!need_count(args.function, count, 3))
        return NULL;
    int ok = IN(0, gate, 'f', ANY, ANY) && IN(1, up, 'f', gate.shape[0], gate.shape[1]) &&
             OUT(2, out, 'f', gate.shape[0], gate.shape[1]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t r = 0; r < gate.shape[0]; r++)
        kernels->silu_mul(row_f32(&gate, r, 0), row_f32(&up, r, 0), (float *)row_f32(&out, r, 0), gate.shape[1]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* x [T, H, D], cos [T, D / 2], sin [T, D / 2], interleaved, out [T, H, D] (not x). */
KERNEL(rope)
{
    arguments args = {.function = "rope"};
    array x, cos, sin, out;
    if (!need_count(args.function, count, 5))
        return NULL;
    int interleaved = PyObject_IsTrue(objects[3]);
    if (interleaved < 0)
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY, ANY) && IN(1, cos, 'f', x.shape[0], ANY) &&
             need(&args, "x", &x, 2, 2 * cos.shape[1]) && IN(2, sin, 'f', x.shape[0], cos.shape[1]) &&
             OUT(4, out, 'f', x.shape[0], x.shape[1], x.shape[2]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < x.shape[0]; t++)
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            kernels->rope(row_f32(&x, t, h), row_f32(&cos, t, 0), row_f32(&sin, t, 0), interleaved,
                          (float *)row_f32(&out, t, h), cos.shape[1]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* y [T, S, H], weights [T, k], residual [T, H], out [T, H]; S >= k. */
KERNEL(combine)
{
    arguments args = {.function = "combine"};
    array y, weights, residual, out;
    if (!need_count(args.function, count, 4))
        return NULL;
    int ok = IN(0, y, 'f', ANY, ANY, ANY) && IN(1, weights, 'f', y.shape[0], ANY) &&
             IN(2, residual, 'f', y.shape[0], y.shape[2]) && OUT(3, out, 'f', y.shape[0], y.shape[2]);
    if (ok && y.shape[1] < weights.shape[1]) {
        PyErr_Format(PyExc_ValueError, "combine: y must have at least %zd slots, got %zd", weights.shape[1],
                     y.shape[1]);
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < y.shape[0]; t++)
        kernels->combine(row_f32(&y, t, 0), y.stride[1], row_f32(&weights, t, 0), y.shape[1], weights.shape[1],
                         row_f32(&residual, t, 0), (float *)row_f32(&out, t, 0), y.shape[2]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* ------------------------------------------------------------------ router */

/* The `k` largest of `values` among those not `taken`, best first; the lower index wins a tie. */
static void largest(const float *values, Py_ssize_t n, Py_ssize_t k, char *taken, int32_t *idx)
{
    for (Py_ssize_t s = 0; s < k; s++) {
        Py_ssize_t best = -1;
        for (Py_ssize_t e = 0; e < n; e++)
            if (!taken[e] && (best < 0 || values[e] > values[best]))
                best = e;
        taken[best] = 1;
        idx[s] = (int32_t)best;
    }
}

/* Leave only the experts of the `keep` groups whose two best choices add up highest. */
static void mask_groups(float *choice, Py_ssize_t num_experts, Py_ssize_t groups, Py_ssize_t keep, float *group_score,
                        char *taken, int32_t *idx)
{
    Py_ssize_t members = num_experts / groups;
    for (Py_ssize_t g = 0; g < groups; g++) {
        memset(taken, 0, members);
        largest(choice + g * members, members, 2, taken, idx);
        group_score[g] = choice[g * members + idx[0]] + choice[g * members + idx[1]];
    }
    memset(taken, 0, groups);
    largest(group_score, groups, keep, taken, idx);
    for (Py_ssize_t e = 0; e < num_experts; e++)
        if (!taken[e / members])
            choice[e] = -INFINITY;
}

/* logits [T, E] (overwritten by scores), bias [E] or None (None = softmax, else sigmoid), n_group, topk_group,
 * norm_topk_prob, routed_scaling_factor, topk_idx [T, k] int32, topk_weights [T, k]. */
KERNEL(route)
{
    arguments args = {.function = "route"};
    array logits, bias = {0}, topk_idx, topk_weights;
    if (!need_count(args.function, count, 8))
        return NULL;
    int has_bias = objects[1] != Py_None, normalise = PyObject_IsTrue(objects[4]);
    Py_ssize_t groups = PyLong_AsSsize_t(objects[2]), keep = PyLong_AsSsize_t(objects[3]);
    double scale = PyFloat_AsDouble(objects[5]);
    if (PyErr_Occurred())
        return NULL;
    int ok = OUT(0, logits, 'f', ANY, ANY) && (!has_bias || IN(1, bias, 'f', logits.shape[1])) &&
             OUT(6, topk_idx, 'i', logits.shape[0], ANY) &&
             OUT(7, topk_weights, 'f', logits.shape[0], topk_idx.shape[1]);
    Py_ssize_t E = ok ? logits.shape[1] : 0, k = ok ? topk_idx.shape[1] : 0;
    if (ok && (groups < 1 || keep < 1 || keep > groups || E % groups != 0 || (groups > 1 && E / groups < 2) || k < 1 ||
               k > keep * (E / groups))) {
        PyErr_Format(PyExc_ValueError, "route: %zd of %zd experts in %zd of %zd groups is impossible", k, E, keep,
                     groups);
        ok = 0;
    }
    float *choice = ok ? malloc(E * (2 * sizeof(float) + sizeof(int32_t) + 1)) : NULL;
    if (ok && choice == NULL) {
        PyErr_NoMemory();
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    float *group_score = choice + E;
    int32_t *scratch = (int32_t *)(group_score + E);
    char *taken = (char *)(scratch + E);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < logits.shape[0]; t++) {
        float *scores = (float *)row_f32(&logits, t, 0), *w = (float *)row_f32(&topk_weights, t, 0);
        int32_t *chosen = (int32_t *)topk_idx.data + t * topk_idx.stride[0];
        if (has_bias) {
            kernels->sigmoid_row(scores, E);
            for (Py_ssize_t e = 0; e < E; e++)
                choice[e] = scores[e] + ((const float *)bias.data)[e];
        } else {
            float sum = kernels->softmax_terms(scores, 1.0f, E);
            for (Py_ssize_t e = 0; e < E; e++)
                choice[e] = scores[e] = scores[e] / sum;
        }
        if (groups > 1)
            mask_groups(choice, E, groups, keep, group_score, taken, scratch);
        memset(taken, 0, E);
        largest(choice, E, k, taken, chosen);
        float sum = has_bias ? 1e-20f : 0.0f;
        for (Py_ssize_t s = 0; s < k; s++)
            sum += scores[chosen[s]];
        for (Py_ssize_t s = 0; s < k; s++)
            w[s] = (normalise ? scores[chosen[s]] / sum : scores[chosen[s]]) * (float)scale;
    }
    Py_END_ALLOW_THREADS;
    free(choice);
    return finish(&args, 1);
}
