// Sums over pixels and rows, losses, gradient norm, optimizer step.
//
// Every sum is computed in two steps, partial sums of a fixed size and then their sum in a fixed order, so that results repeat
// bit by bit.

template <int V>
__device__ __forceinline__ void column_sums_of(In x, Out out, float *parts, u32 *counters, int rows, int c, int run) {
    int image = blockIdx.z;
    sum_columns<V, 1>(
        rows, c, run, parts + image * gridDim.y * c, counters + image * gridDim.x + blockIdx.x,
        [=](int r, int ch, float (&sums)[1][V]) {
            float v[V];
            x.get<V>((image * rows + r) * c + ch, v);
#pragma unroll
            for (int j = 0; j < V; j++) sums[0][j] += v[j];
        },
        [=](int ch, const double (&sums)[1]) { out.set(image * c + ch, (float)sums[0]); });
}

// out[image, c] = sum over the rows of x [images, rows, c]; blockIdx.z is the image.
extern "C" __global__ void column_sums(In x, Out out, float *parts, u32 *counters, int rows, int c, int run) {
    if (c % 4 == 0)
        column_sums_of<4>(x, out, parts, counters, rows, c, run);
    else
        column_sums_of<1>(x, out, parts, counters, rows, c, run);
}

// out[c] = sum over parts of parts[part, c]. Blocks of 32 channels by 16 parts.
extern "C" __global__ void add_parts(const float *parts, float *out, int count, int c) {
    __shared__ double shared[16][32];
    int ch = blockIdx.x * 32 + threadIdx.x;
    double sum = sum_of_parts<16>(parts, count, c, ch, ch < c, shared);
    if (threadIdx.y == 0 && ch < c) out[ch] = (float)sum;
}

// The same for parts [count, 2, c], with two results.
extern "C" __global__ void add_pairs(const float *parts, float *first, float *second, int count, int c) {
    __shared__ double shared[16][32];
    int ch = blockIdx.x * 32 + threadIdx.x;
    double a = sum_of_parts<16>(parts, count, 2 * c, ch, ch < c, shared);
    double b = sum_of_parts<16>(parts, count, 2 * c, c + ch, ch < c, shared);
    if (threadIdx.y == 0 && ch < c) {
        first[ch] = (float)a;
        second[ch] = (float)b;
    }
}

// ---------------------------------------------------------------------------------------------------------- losses

// 0: d^2; 1: |d|; 2: Huber. As in ddpm_kernels::loss; comparisons preserve NaN.
__device__ __forceinline__ float loss_value(int kind, float delta, float d) {
    if (kind == 0) return d * d;
    d = fabsf(d);
    if (kind == 1) return d;
    float m = d > delta ? delta : d;
    return m * fmaf(-0.5f, m, d);
}

__device__ __forceinline__ float loss_derivative(int kind, float delta, float d) {
    if (kind == 0) return 2.0f * d;
    if (kind == 1) return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
    return d < -delta ? -delta : d > delta ? delta : d;
}

// Weight of element i's image; 1 if there are no weights (`steps` 0).
__device__ __forceinline__ float weight_of(const float *t, const float *weights, int steps, int image, int i) {
    return steps == 0 ? 1.0f : weights[min((int)t[i / image], steps - 1)];
}

// y = the mean of the weighted losses: partial sums of `run` elements, added by the last block.
extern "C" __global__ void loss(const float *a, const float *b, const float *t, const float *weights, float *y, double *parts,
                                u32 *counter, int n, int image, int steps, int kind, float delta, int run) {
    int last = min(n, (int)(blockIdx.x + 1) * run);
    double sum = 0.0;
    for (int i = blockIdx.x * run + threadIdx.x; i < last; i += blockDim.x)
        sum += (double)weight_of(t, weights, steps, image, i) * (double)loss_value(kind, delta, a[i] - b[i]);
    if (sum_of_grid(sum, parts, counter) && threadIdx.x == 0) y[0] = (float)(sum / (double)n);
}

extern "C" __global__ void loss_grad(const float *a, const float *b, const float *t, const float *weights,
                                     const float *dloss, float *y, int n, int image, int steps, int kind, float delta) {
    double share = (double)dloss[0] / (double)n;
    for (int i = grid_thread(); i < n; i += grid_size()) {
        float factor = (float)((double)weight_of(t, weights, steps, image, i) * share);
        y[i] = factor * loss_derivative(kind, delta, a[i] - b[i]);
    }
}

// -------------------------------------------------------------------------------------------------------- optimizer

// The sum of squares, in partial sums of `run` elements that the last block adds.
extern "C" __global__ void squared_norm(const float *x, double *parts, u32 *counter, int n, int run, Control *control) {
    int last = min(n, (int)(blockIdx.x + 1) * run);
    double sum = 0.0;
    for (int i = blockIdx.x * run + threadIdx.x; i < last; i += blockDim.x) sum += (double)x[i] * (double)x[i];
    if (sum_of_grid(sum, parts, counter) && threadIdx.x == 0) control->squared_norm = sum;
}

// Skips the weight update if the loss or the gradient norm is not finite; scales gradients whose norm exceeds `clip_norm`
// (0: no clipping), as ddpm_engine::clip_scale.
extern "C" __global__ void check_and_clip(const float *loss, const double *clip_norm, Control *control) {
    if (grid_thread() > 0) return;
    double square = control->squared_norm;
    bool finite = fabsf(loss[0]) < INFINITY && fabs(square) < (double)INFINITY;
    control->skipped = finite ? 0 : 1;
    control->loss = loss[0];
    if (clip_norm[0] > 0.0) {
        double share = clip_norm[0] / (sqrt(square) + 1e-6);
        if (share < 1.0) control->scale = (float)((double)control->scale * share);
    }
}

// Saves (or, if `back`, restores) tensors, one block each. Addresses are byte offsets from `base`.
struct StateTable {
    u64 at, snapshot;
    int len, unused;
};

extern "C" __global__ void snapshot_states(char *base, const StateTable *table, int back) {
    StateTable t = table[blockIdx.x];
    const float *from = (const float *)(base + (back ? t.snapshot : t.at));
    float *to = (float *)(base + (back ? t.at : t.snapshot));
    for (int i = threadIdx.x; i < t.len; i += blockDim.x) to[i] = from[i];
}

// One step of Adam or AdamW, and of the weights' moving average if `has_ema`, as in ddpm_kernels::elementwise::adam.
extern "C" __global__ void adam(const float *grad, float *weight, float *exp_avg, float *exp_avg_sq, float *ema, int n,
                                int has_ema, const Control *control) {
    Control k = *control;
    if (k.skipped) return;
    for (int i = grid_thread(); i < n; i += grid_size()) {
        float w = weight[i], m = exp_avg[i], v = exp_avg_sq[i];
        float g = fmaf(k.decay, w, grad[i] * k.scale);
        w = w * k.shrink;
        m = fmaf(k.share1, g - m, m);
        v = fmaf(g * g, k.share2, v * k.beta2);
        w = fmaf(k.rate, m / fmaf(sqrtf(v), k.root, k.eps), w);
        weight[i] = w;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        if (has_ema) ema[i] = fmaf(k.ema_share, w - ema[i], ema[i]);
    }
}
