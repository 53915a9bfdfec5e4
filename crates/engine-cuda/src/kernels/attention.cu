// Multi-head self-attention in f32, in tiles; the attention weights are never stored. qkv [n, tokens, 3 c], o [n, tokens, c],
// lse [n, tokens, heads].
//
// T neighbouring threads share a query (or, for dk and dv, a key); each holds E elements of the head's width in registers, in
// groups of four that are T groups apart, so that the threads of one key read adjacent shared memory. E T is at least the head's
// width; elements beyond it are zero. Tiles of keys (or queries) go through shared memory. Exponentials are base 2: queries are
// scaled by log2(e) / sqrt(width).

#define THREADS 128

// Keys per tile, for rows of D elements: two such tiles take at most 32 KiB.
template <int D> struct Tile {
    static const int ROWS = 4096 / D < 64 ? 4096 / D : 64;
};

// Position within the head's row of register i of a thread.
template <int T> __device__ __forceinline__ int column_of(int i, int thread) { return (i / 4 * T + thread) * 4 + i % 4; }

template <int E, int T> __device__ __forceinline__ float sum_of_threads(float v) {
    for (int d = 1; d < T; d *= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

// Loads registers from a row of global memory, with zeros beyond the width.
template <int E, int T>
__device__ __forceinline__ void load_row(const float *row, bool there, int width, int thread, float scale, float (&out)[E]) {
    for (int i = 0; i < E; i++) {
        int d = column_of<T>(i, thread);
        out[i] = there && d < width ? row[d] * scale : 0.0f;
    }
}

template <int E, int T>
__device__ __forceinline__ void store_row(float *row, int width, int thread, float scale, const float (&v)[E]) {
    for (int i = 0; i < E; i++) {
        int d = column_of<T>(i, thread);
        if (d < width) row[d] = v[i] * scale;
    }
}

// Loads rows `first ..` of a tensor with `stride` elements per token into a tile, with zeros out of range.
template <int D>
__device__ __forceinline__ void load_tile(const float *from, int stride, int first, int tokens, int width, float *tile) {
    for (int i = threadIdx.x; i < Tile<D>::ROWS * D; i += THREADS) {
        int row = first + i / D, d = i % D;
        tile[i] = row < tokens && d < width ? from[row * stride + d] : 0.0f;
    }
}

template <int E, int T>
__device__ __forceinline__ float dot(const float (&v)[E], const float *row, int thread) {
    float sum = 0.0f;
    for (int i = 0; i < E / 4; i++) {
        float4 w = ((const float4 *)row)[i * T + thread];
        sum = fmaf(v[4 * i], w.x, sum);
        sum = fmaf(v[4 * i + 1], w.y, sum);
        sum = fmaf(v[4 * i + 2], w.z, sum);
        sum = fmaf(v[4 * i + 3], w.w, sum);
    }
    return sum_of_threads<E, T>(sum);
}

// v += p row
template <int E, int T> __device__ __forceinline__ void add_row(float p, const float *row, int thread, float (&v)[E]) {
    for (int i = 0; i < E / 4; i++) {
        float4 w = ((const float4 *)row)[i * T + thread];
        v[4 * i] = fmaf(p, w.x, v[4 * i]);
        v[4 * i + 1] = fmaf(p, w.y, v[4 * i + 1]);
        v[4 * i + 2] = fmaf(p, w.z, v[4 * i + 2]);
        v[4 * i + 3] = fmaf(p, w.w, v[4 * i + 3]);
    }
}

// Block x: queries; y: head; z: image.
template <int E, int T>
__device__ void attention_forward(const float *qkv, float *o, float *lse, int tokens, int c, int heads, const Control *control,
                                  Dropout drop) {
    const int D = E * T, ROWS = Tile<D>::ROWS, STEP = ROWS < 8 ? ROWS : 8;
    __shared__ float4 k_memory[ROWS * D / 4], v_memory[ROWS * D / 4];
    float *keys = (float *)k_memory, *values = (float *)v_memory;
    int head = blockIdx.y, width = c / heads, thread = threadIdx.x % T;
    int query = blockIdx.x * (THREADS / T) + threadIdx.x / T;
    const float *head_base = qkv + blockIdx.z * tokens * 3 * c + head * width;
    float q[E], sum[E], row_max = -INFINITY, total = 0.0f;
    load_row<E, T>(head_base + query * 3 * c, query < tokens, width, thread, 1.4426950408889634f / sqrtf((float)width), q);
    for (int i = 0; i < E; i++) sum[i] = 0.0f;
    for (int first = 0; first < tokens; first += ROWS) {
        __syncthreads();
        load_tile<D>(head_base + c, 3 * c, first, tokens, width, keys);
        load_tile<D>(head_base + 2 * c, 3 * c, first, tokens, width, values);
        __syncthreads();
        for (int row = 0; row < ROWS && first + row < tokens; row += STEP) {
            float s[STEP], new_max = row_max;
            for (int i = 0; i < STEP; i++) {
                s[i] = dot<E, T>(q, keys + (row + i) * D, thread);
                if (first + row + i >= tokens) s[i] = -INFINITY;
                new_max = fmaxf(new_max, s[i]);
            }
            float rescale = exp2f(row_max - new_max);
            row_max = new_max;
            total *= rescale;
            for (int i = 0; i < E; i++) sum[i] *= rescale;
            for (int i = 0; i < STEP; i++) {
                float p = exp2f(s[i] - row_max);
                total += p;
                p *= dropout_factor(drop, control, head, tokens, query, first + row + i);
                add_row<E, T>(p, values + (row + i) * D, thread, sum);
            }
        }
    }
    if (query < tokens) {
        int token = blockIdx.z * tokens + query;
        store_row<E, T>(o + token * c + head * width, width, thread, 1.0f / total, sum);
        if (thread == 0) lse[token * heads + head] = (row_max + log2f(total)) * 0.69314718055994531f;
    }
}

#ifdef ATTENTION_DELTA
// delta[token, head] = do . o, per head.
extern "C" __global__ void attention_delta(In o, In d_o, float *delta, int n, int width) {
    for (int i = grid_thread(); i < n; i += grid_size()) {
        float sum = 0.0f;
        int d = 0;
        if (width % 8 == 0)
            for (; d < width; d += 8) {
                float a[8], b[8];
                o.get<8>(i * width + d, a);
                d_o.get<8>(i * width + d, b);
#pragma unroll
                for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
            }
        for (; d < width; d++) sum = fmaf(o[i * width + d], d_o[i * width + d], sum);
        delta[i] = sum;
    }
}
#endif

// dq = sum over keys of ds k / sqrt(width), ds = p (D (do . v) - delta).
template <int E, int T>
__device__ void attention_dq(const float *qkv, const float *lse, const float *delta, const float *d_o, float *dqkv, int tokens,
                             int c, int heads, const Control *control, Dropout drop) {
    const int D = E * T, ROWS = Tile<D>::ROWS;
    __shared__ float4 k_memory[ROWS * D / 4], v_memory[ROWS * D / 4];
    float *keys = (float *)k_memory, *values = (float *)v_memory;
    int head = blockIdx.y, width = c / heads, thread = threadIdx.x % T;
    int query = blockIdx.x * (THREADS / T) + threadIdx.x / T, token = blockIdx.z * tokens + query;
    bool there = query < tokens;
    const float *head_base = qkv + blockIdx.z * tokens * 3 * c + head * width;
    float q[E], g[E], sum[E], scale = 1.0f / sqrtf((float)width);
    load_row<E, T>(head_base + query * 3 * c, there, width, thread, 1.4426950408889634f * scale, q);
    load_row<E, T>(d_o + token * c + head * width, there, width, thread, 1.0f, g);
    for (int i = 0; i < E; i++) sum[i] = 0.0f;
    float log2_total = there ? lse[token * heads + head] * 1.4426950408889634f : 0.0f;
    float mean = there ? delta[token * heads + head] : 0.0f;
    for (int first = 0; first < tokens; first += ROWS) {
        __syncthreads();
        load_tile<D>(head_base + c, 3 * c, first, tokens, width, keys);
        load_tile<D>(head_base + 2 * c, 3 * c, first, tokens, width, values);
        __syncthreads();
        for (int row = 0; row < ROWS && first + row < tokens; row++) {
            float p = exp2f(dot<E, T>(q, keys + row * D, thread) - log2_total);
            float dp = dot<E, T>(g, values + row * D, thread);
            dp *= dropout_factor(drop, control, head, tokens, query, first + row);
            add_row<E, T>(p * (dp - mean), keys + row * D, thread, sum);
        }
    }
    if (there) store_row<E, T>(dqkv + token * 3 * c + head * width, width, thread, scale, sum);
}

// dk = sum over queries of ds q / sqrt(width), dv = sum over queries of p D do.
template <int E, int T>
__device__ void attention_dkv(const float *qkv, const float *lse, const float *delta, const float *d_o, float *dqkv, int tokens,
                              int c, int heads, const Control *control, Dropout drop) {
    const int D = E * T, ROWS = Tile<D>::ROWS;
    __shared__ float4 q_memory[ROWS * D / 4], g_memory[ROWS * D / 4];
    __shared__ float logs[ROWS], means[ROWS];
    float *queries = (float *)q_memory, *gradients = (float *)g_memory;
    int head = blockIdx.y, width = c / heads, thread = threadIdx.x % T;
    int key = blockIdx.x * (THREADS / T) + threadIdx.x / T;
    bool there = key < tokens;
    const float *head_base = qkv + blockIdx.z * tokens * 3 * c + head * width;
    float k[E], v[E], dk[E], dv[E], scale = 1.0f / sqrtf((float)width);
    load_row<E, T>(head_base + key * 3 * c + c, there, width, thread, 1.4426950408889634f * scale, k);
    load_row<E, T>(head_base + key * 3 * c + 2 * c, there, width, thread, 1.0f, v);
    for (int i = 0; i < E; i++) dk[i] = dv[i] = 0.0f;
    for (int first = 0; first < tokens; first += ROWS) {
        __syncthreads();
        load_tile<D>(head_base, 3 * c, first, tokens, width, queries);
        load_tile<D>(d_o + blockIdx.z * tokens * c + head * width, c, first, tokens, width, gradients);
        for (int i = threadIdx.x; i < ROWS; i += THREADS) {
            int at = (blockIdx.z * tokens + first + i) * heads + head;
            logs[i] = first + i < tokens ? lse[at] * 1.4426950408889634f : 0.0f;
            means[i] = first + i < tokens ? delta[at] : 0.0f;
        }
        __syncthreads();
        for (int row = 0; row < ROWS && first + row < tokens; row++) {
            float p = exp2f(dot<E, T>(k, queries + row * D, thread) - logs[row]);
            float dp = dot<E, T>(v, gradients + row * D, thread);
            float factor = dropout_factor(drop, control, head, tokens, first + row, key);
            add_row<E, T>(p * factor, gradients + row * D, thread, dv);
            add_row<E, T>(p * (dp * factor - means[row]), queries + row * D, thread, dk);
        }
    }
    if (there) {
        float *row = dqkv + (blockIdx.z * tokens + key) * 3 * c + head * width;
        store_row<E, T>(row + c, width, thread, scale, dk);
        store_row<E, T>(row + 2 * c, width, thread, 1.0f, dv);
    }
}

#define ATTENTION(E, T, NAME)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                 \
        attention_##NAME(const float *qkv, float *o, float *lse, int tokens, int c, int heads, const Control *control,    \
                         u32 purpose, u32 threshold, float scale) {                                                       \
        attention_forward<E, T>(qkv, o, lse, tokens, c, heads, control, Dropout{purpose, threshold, scale, (int)blockIdx.z});                 \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                 \
        attention_dq_##NAME(const float *qkv, const float *lse, const float *delta, const float *d_o, float *dqkv,        \
                            int tokens, int c, int heads, const Control *control, u32 purpose, u32 threshold,             \
                            float scale) {                                                                                \
        attention_dq<E, T>(qkv, lse, delta, d_o, dqkv, tokens, c, heads, control, Dropout{purpose, threshold, scale, (int)blockIdx.z});       \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                 \
        attention_dkv_##NAME(const float *qkv, const float *lse, const float *delta, const float *d_o, float *dqkv,       \
                             int tokens, int c, int heads, const Control *control, u32 purpose, u32 threshold,            \
                             float scale) {                                                                               \
        attention_dkv<E, T>(qkv, lse, delta, d_o, dqkv, tokens, c, heads, control, Dropout{purpose, threshold, scale, (int)blockIdx.z});      \
    }

// One instantiation per maximum head width.
#ifdef ATTENTION_4
ATTENTION(4, 1, 4)
#endif
#ifdef ATTENTION_8
ATTENTION(8, 1, 8)
#endif
#ifdef ATTENTION_16
ATTENTION(16, 1, 16)
#endif
#ifdef ATTENTION_32
ATTENTION(32, 1, 32)
#endif
#ifdef ATTENTION_64
ATTENTION(32, 2, 64)
#endif
#ifdef ATTENTION_128
ATTENTION(32, 4, 128)
#endif
#ifdef ATTENTION_256
ATTENTION(32, 8, 256)
#endif
#ifdef ATTENTION_512
ATTENTION(32, 16, 512)
#endif
