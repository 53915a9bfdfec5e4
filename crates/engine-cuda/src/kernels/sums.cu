// Sums over pixels and rows, losses, the gradients' norm, the optimizer's step.
//
// Every sum is made in two steps, parts of a fixed size and then the parts in order, so that a run gives the same bits
// each time.

// Sums of runs of rows of x [pictures, rows, c]: out[picture, run, c]. Blocks of 32 channels by 8 rows.
extern "C" __global__ void column_sums(In x, Out out, int rows, int c, int run) {
    __shared__ float parts[8][32];
    int ch = blockIdx.x * 32 + threadIdx.x, last = min(rows, (int)(blockIdx.y + 1) * run);
    float sum = 0.0f;
    if (ch < c)
#pragma unroll 4
        for (int r = blockIdx.y * run + threadIdx.y; r < last; r += 8) sum += x[(blockIdx.z * rows + r) * c + ch];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && ch < c) {
        for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
        out.set((blockIdx.z * gridDim.y + blockIdx.y) * c + ch, sum);
    }
}

// out[picture, c] = sum over parts of parts[picture, part, from + c], rows of `stride` numbers. blockIdx.y: the picture.
extern "C" __global__ void add_parts(const float *parts, Out out, int count, int stride, int from, int c) {
    const float *mine = parts + blockIdx.y * count * stride + from;
    for (int ch = thread_of_grid(); ch < c; ch += threads_of_grid()) {
        double sum = 0.0;
        for (int i = 0; i < count; i++) sum += (double)mine[i * stride + ch];
        out.set(blockIdx.y * c + ch, (float)sum);
    }
}

// ---------------------------------------------------------------------------------------------------------- losses

// 0: d^2; 1: |d|; 2: Huber's. As ddpm_kernels::loss; comparisons keep NaN.
__device__ __forceinline__ float loss_of(int kind, float delta, float d) {
    if (kind == 0) return d * d;
    d = fabsf(d);
    if (kind == 1) return d;
    float m = d > delta ? delta : d;
    return m * fmaf(-0.5f, m, d);
}

__device__ __forceinline__ float slope_of(int kind, float delta, float d) {
    if (kind == 0) return 2.0f * d;
    if (kind == 1) return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
    return d < -delta ? -delta : d > delta ? delta : d;
}

// The weight of number i's picture; 1 where there are no weights (`steps` 0).
__device__ __forceinline__ float weight_of(const float *t, const float *weights, int steps, int picture, int i) {
    return steps == 0 ? 1.0f : weights[min((int)t[i / picture], steps - 1)];
}

// Parts of the weighted sum of losses, `run` numbers each.
extern "C" __global__ void loss_parts(const float *a, const float *b, const float *t, const float *weights, double *parts,
                                      int n, int picture, int steps, int kind, float delta, int run) {
    __shared__ double shared[32];
    int last = min(n, (int)(blockIdx.x + 1) * run);
    double sum = 0.0;
    for (int i = blockIdx.x * run + threadIdx.x; i < last; i += blockDim.x)
        sum += (double)weight_of(t, weights, steps, picture, i) * (double)loss_of(kind, delta, a[i] - b[i]);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// y = sum of the parts / n; one block.
extern "C" __global__ void loss_mean(const double *parts, float *y, int count, int n) {
    __shared__ double shared[32];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) y[0] = (float)(sum / (double)n);
}

extern "C" __global__ void loss_grad(const float *a, const float *b, const float *t, const float *weights,
                                     const float *dloss, float *y, int n, int picture, int steps, int kind, float delta) {
    double share = (double)dloss[0] / (double)n;
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) {
        float factor = (float)((double)weight_of(t, weights, steps, picture, i) * share);
        y[i] = factor * slope_of(kind, delta, a[i] - b[i]);
    }
}

// -------------------------------------------------------------------------------------------------------- optimizer

extern "C" __global__ void square_parts(const float *x, double *parts, int n, int run) {
    __shared__ double shared[32];
    int last = min(n, (int)(blockIdx.x + 1) * run);
    double sum = 0.0;
    for (int i = blockIdx.x * run + threadIdx.x; i < last; i += blockDim.x) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void squared_norm(const double *parts, int count, Control *control) {
    __shared__ double shared[32];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) control->squared_norm = sum;
}

// The weights stay as they are where the loss or the gradients' norm is not a finite number.
extern "C" __global__ void hold(const float *loss, Control *control) {
    if (thread_of_grid() > 0) return;
    bool finite = fabsf(loss[0]) < INFINITY && fabs(control->squared_norm) < (double)INFINITY;
    control->held = finite ? 0 : 1;
}

// One step of Adam or AdamW and of the weights' moving average (`has_ema`), as ddpm_kernels::elementwise::adam.
extern "C" __global__ void adam(const float *grad, float *weight, float *exp_avg, float *exp_avg_sq, float *ema, int n,
                                int has_ema, const Control *control) {
    Control k = *control;
    if (k.held) return;
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) {
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
