// Multi-head self-attention on tensor cores: factors in bf16, sums and softmax in f32; tensors as in attention.cu.
//
// A warp has 16 queries (or, for dk and dv, keys), a block four warps. Scores of a tile of keys are made in registers;
// they become the left factor of the next product where they are, because a result's fragment of two neighbouring tiles
// of 8 columns is the left factor's fragment of 16 (mma, common.cu). D is the head's width or more, a multiple of 16.
//
// Right factors lie in shared memory in two ways, each free of bank conflicts:
//   rows:  [row][D / 2 words], pairs along the width: what is multiplied and summed along the width
//   pairs: [row / 2][D words], pairs along the rows: what is summed along the rows

#define MMA_THREADS 128

// Keys (or queries) of a tile, so that four tiles fit into 48 KiB.
template <int D> struct Sizes {
    static const int ROWS = D > 64 ? 32 : 64, HALF = D > 32 ? 32 : 64;
    static const int ROW_STRIDE = D / 2 + 4, PAIR_STRIDE = D + 8;
};

// Rows `first ..` of a tensor with `stride` numbers a token, as rows.
template <int D, int ROWS>
__device__ __forceinline__ void fill_rows(In from, int stride, int first, int tokens, int width, u32 *tile) {
    if (width % 8 == 0) {
        for (int i = threadIdx.x; i < ROWS * D / 8; i += MMA_THREADS) {
            int row = i / (D / 8), d = i % (D / 8) * 8;
            uint4 words = make_uint4(0, 0, 0, 0);
            if (first + row < tokens && d < width) words = from.packed((first + row) * stride + d);
            *(uint4 *)(tile + row * Sizes<D>::ROW_STRIDE + d / 2) = words;
        }
        return;
    }
    for (int i = threadIdx.x; i < ROWS * D / 2; i += MMA_THREADS) {
        int row = i / (D / 2), word = i % (D / 2), at = (first + row) * stride + 2 * word;
        bool there = first + row < tokens;
        float a = there && 2 * word < width ? from[at] : 0.0f, b = there && 2 * word + 1 < width ? from[at + 1] : 0.0f;
        tile[row * Sizes<D>::ROW_STRIDE + word] = pack_bf16(a, b);
    }
}

// The same as pairs.
template <int D, int ROWS>
__device__ __forceinline__ void fill_pairs(In from, int stride, int first, int tokens, int width, u32 *tile) {
    if (width % 8 == 0) {
        for (int i = threadIdx.x; i < ROWS / 2 * D / 8; i += MMA_THREADS) {
            int pair = i / (D / 8), d = i % (D / 8) * 8, row = first + 2 * pair;
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            if (row < tokens && d < width) a = from.packed(row * stride + d);
            if (row + 1 < tokens && d < width) b = from.packed((row + 1) * stride + d);
            u32 *to = tile + pair * Sizes<D>::PAIR_STRIDE + d;
            *(uint4 *)to = make_uint4(lower_halves(a.x, b.x), upper_halves(a.x, b.x), lower_halves(a.y, b.y),
                                      upper_halves(a.y, b.y));
            *(uint4 *)(to + 4) = make_uint4(lower_halves(a.z, b.z), upper_halves(a.z, b.z), lower_halves(a.w, b.w),
                                            upper_halves(a.w, b.w));
        }
        return;
    }
    for (int i = threadIdx.x; i < ROWS / 2 * D; i += MMA_THREADS) {
        int pair = i / D, d = i % D, row = first + 2 * pair;
        float a = row < tokens && d < width ? from[row * stride + d] : 0.0f;
        float b = row + 1 < tokens && d < width ? from[(row + 1) * stride + d] : 0.0f;
        tile[pair * Sizes<D>::PAIR_STRIDE + d] = pack_bf16(a, b);
    }
}

// A warp's 16 rows `first ..` as left factors, times `scale`.
template <int D>
__device__ __forceinline__ void left_factor(In from, int stride, int first, int tokens, int width, float scale,
                                            u32 (&to)[D / 16][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first + g + i % 2 * 8, d = k * 16 + i / 2 * 8 + 2 * t, at = row * stride + d;
            float v[2] = {0.0f, 0.0f};
            if (row < tokens && width % 2 == 0 && d < width) {
                from.get<2>(at, v);
            } else if (row < tokens) {
                if (d < width) v[0] = from[at];
                if (d + 1 < width) v[1] = from[at + 1];
            }
            to[k][i] = pack_bf16(v[0] * scale, v[1] * scale);
        }
}

// s[row, column] = sum over the width of left[row] rows[column], for COLUMNS rows of a tile.
template <int D, int COLUMNS>
__device__ __forceinline__ void scores(const u32 (&left)[D / 16][4], const u32 *rows, float (&s)[COLUMNS / 8][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const u32 *at = rows + (j * 8 + g) * Sizes<D>::ROW_STRIDE + k * 8 + t;
            u32 right[2] = {at[0], at[4]};
            mma_bf16(s[j], left[k], right);
        }
    }
}

// sum[row] += sum over columns of p[row, column] pairs[column].
template <int D, int COLUMNS>
__device__ __forceinline__ void add_products(const float (&p)[COLUMNS / 8][4], const u32 *pairs, float (&sum)[D / 8][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        u32 left[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                       pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const u32 *at = pairs + (k * 8 + t) * Sizes<D>::PAIR_STRIDE + j * 8 + g;
            u32 right[2] = {at[0], at[4 * Sizes<D>::PAIR_STRIDE]};
            mma_bf16(sum[j], left, right);
        }
    }
}

// A warp's 16 rows of results, times a factor of each of the lane's two rows.
template <int D>
__device__ __forceinline__ void store_rows(Out to, int stride, int first, int tokens, int width, const float (&factor)[2],
                                           const float (&sum)[D / 8][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + g + r * 8, d = j * 8 + 2 * t, at = row * stride + d;
            float v[2] = {sum[j][2 * r] * factor[r], sum[j][2 * r + 1] * factor[r]};
            if (row >= tokens || d >= width) continue;
            if (width % 2 == 0) {
                to.set<2>(at, v);
            } else {
                to.set(at, v[0]);
                if (d + 1 < width) to.set(at + 1, v[1]);
            }
        }
}

template <int D> __device__ __forceinline__ void clear(float (&sum)[D / 8][4]) {
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
}

// Block x: queries; y: head; z: picture.
template <int D>
__device__ void attention_mma_forward(In qkv, Out o, float *lse, int tokens, int c, int heads,
                                      const Control *control, Drop drop) {
    const int KEYS = Sizes<D>::ROWS;
    __shared__ u32 keys[KEYS * Sizes<D>::ROW_STRIDE], values[KEYS / 2 * Sizes<D>::PAIR_STRIDE];
    int head = blockIdx.y, width = c / heads, first = blockIdx.x * 64 + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    In of_head = qkv.from(blockIdx.z * tokens * 3 * c + head * width);
    u32 q[D / 16][4];
    left_factor<D>(of_head, 3 * c, first, tokens, width, 1.4426950408889634f / sqrtf((float)width), q);
    float sum[D / 8][4], most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    clear<D>(sum);
    for (int tile = 0; tile < tokens; tile += KEYS) {
        __syncthreads();
        fill_rows<D, KEYS>(of_head.from(c), 3 * c, tile, tokens, width, keys);
        fill_pairs<D, KEYS>(of_head.from(2 * c), 3 * c, tile, tokens, width, values);
        __syncthreads();
        float s[KEYS / 8][4];
        scores<D, KEYS>(q, keys, s);
        float next[2] = {most[0], most[1]};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (tile + j * 8 + 2 * t + i % 2 >= tokens) s[j][i] = -INFINITY;
                next[i / 2] = fmaxf(next[i / 2], s[j][i]);
            }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // The four lanes of a row.
            next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 1));
            next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 2));
            shrink[r] = exp2f(most[r] - next[r]);
            most[r] = next[r];
            total[r] *= shrink[r];
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[j][i] *= shrink[i / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = exp2f(s[j][i] - most[i / 2]);
                total[i / 2] += p;
                int query = first + g + i / 2 * 8, key = tile + j * 8 + 2 * t + i % 2;
                s[j][i] = p * drop_factor(drop, control, head, tokens, query, key);
            }
        add_products<D, KEYS>(s, values, sum);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        factor[r] = 1.0f / total[r];
        int query = first + g + r * 8;
        if (t == 0 && query < tokens)
            lse[(blockIdx.z * tokens + query) * heads + head] = (most[r] + log2f(total[r])) * 0.69314718055994531f;
    }
    store_rows<D>(o.from(blockIdx.z * tokens * c + head * width), c, first, tokens, width, factor, sum);
}

// dq = sum over keys of ds k / sqrt(width), ds = p (D (do . v) - delta).
template <int D>
__device__ void attention_mma_dq(In qkv, const float *lse, const float *delta, In d_o, Out dqkv,
                                 int tokens, int c, int heads, const Control *control, Drop drop) {
    const int KEYS = Sizes<D>::HALF;
    __shared__ u32 keys[KEYS * Sizes<D>::ROW_STRIDE], values[KEYS * Sizes<D>::ROW_STRIDE];
    __shared__ u32 key_pairs[KEYS / 2 * Sizes<D>::PAIR_STRIDE];
    int head = blockIdx.y, width = c / heads, first = blockIdx.x * 64 + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    In of_head = qkv.from(blockIdx.z * tokens * 3 * c + head * width);
    float scale = 1.0f / sqrtf((float)width);
    u32 q[D / 16][4], gradient[D / 16][4];
    left_factor<D>(of_head, 3 * c, first, tokens, width, 1.4426950408889634f * scale, q);
    left_factor<D>(d_o.from(blockIdx.z * tokens * c + head * width), c, first, tokens, width, 1.0f, gradient);
    float sum[D / 8][4], log2_total[2], mean[2];
    clear<D>(sum);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = first + g + r * 8, at = (blockIdx.z * tokens + query) * heads + head;
        log2_total[r] = query < tokens ? lse[at] * 1.4426950408889634f : 0.0f;
        mean[r] = query < tokens ? delta[at] : 0.0f;
    }
    for (int tile = 0; tile < tokens; tile += KEYS) {
        __syncthreads();
        fill_rows<D, KEYS>(of_head.from(c), 3 * c, tile, tokens, width, keys);
        fill_rows<D, KEYS>(of_head.from(2 * c), 3 * c, tile, tokens, width, values);
        fill_pairs<D, KEYS>(of_head.from(c), 3 * c, tile, tokens, width, key_pairs);
        __syncthreads();
        float s[KEYS / 8][4], dp[KEYS / 8][4];
        scores<D, KEYS>(q, keys, s);
        scores<D, KEYS>(gradient, values, dp);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int query = first + g + i / 2 * 8, key = tile + j * 8 + 2 * t + i % 2;
                float p = key < tokens ? exp2f(s[j][i] - log2_total[i / 2]) : 0.0f;
                float factor = drop_factor(drop, control, head, tokens, query, key);
                s[j][i] = p * (dp[j][i] * factor - mean[i / 2]);
            }
        add_products<D, KEYS>(s, key_pairs, sum);
    }
    float factor[2] = {scale, scale};
    store_rows<D>(dqkv.from(blockIdx.z * tokens * 3 * c + head * width), 3 * c, first, tokens, width, factor, sum);
}

// dk = sum over queries of ds q / sqrt(width), dv = sum over queries of p D do. Rows are keys, columns queries.
template <int D>
__device__ void attention_mma_dkv(In qkv, const float *lse, const float *delta, In d_o, Out dqkv,
                                  int tokens, int c, int heads, const Control *control, Drop drop) {
    const int QUERIES = 32;
    __shared__ u32 queries[QUERIES * Sizes<D>::ROW_STRIDE], gradients[QUERIES * Sizes<D>::ROW_STRIDE];
    __shared__ u32 query_pairs[QUERIES / 2 * Sizes<D>::PAIR_STRIDE], gradient_pairs[QUERIES / 2 * Sizes<D>::PAIR_STRIDE];
    __shared__ float logs[QUERIES], means[QUERIES];
    int head = blockIdx.y, width = c / heads, first = blockIdx.x * 64 + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    In of_head = qkv.from(blockIdx.z * tokens * 3 * c + head * width);
    In of_gradient = d_o.from(blockIdx.z * tokens * c + head * width);
    float scale = 1.0f / sqrtf((float)width);
    u32 k[D / 16][4], v[D / 16][4];
    left_factor<D>(of_head.from(c), 3 * c, first, tokens, width, 1.4426950408889634f * scale, k);
    left_factor<D>(of_head.from(2 * c), 3 * c, first, tokens, width, 1.0f, v);
    float dk[D / 8][4], dv[D / 8][4];
    clear<D>(dk);
    clear<D>(dv);
    for (int tile = 0; tile < tokens; tile += QUERIES) {
        __syncthreads();
        fill_rows<D, QUERIES>(of_head, 3 * c, tile, tokens, width, queries);
        fill_pairs<D, QUERIES>(of_head, 3 * c, tile, tokens, width, query_pairs);
        fill_rows<D, QUERIES>(of_gradient, c, tile, tokens, width, gradients);
        fill_pairs<D, QUERIES>(of_gradient, c, tile, tokens, width, gradient_pairs);
        for (int i = threadIdx.x; i < QUERIES; i += MMA_THREADS) {
            int at = (blockIdx.z * tokens + tile + i) * heads + head;
            logs[i] = tile + i < tokens ? lse[at] * 1.4426950408889634f : 0.0f;
            means[i] = tile + i < tokens ? delta[at] : 0.0f;
        }
        __syncthreads();
        float s[QUERIES / 8][4], dp[QUERIES / 8][4];
        scores<D, QUERIES>(k, queries, s);
        scores<D, QUERIES>(v, gradients, dp);
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = first + g + i / 2 * 8, column = j * 8 + 2 * t + i % 2;
                float p = tile + column < tokens ? exp2f(s[j][i] - logs[column]) : 0.0f;
                float factor = drop_factor(drop, control, head, tokens, tile + column, key);
                s[j][i] = p * factor;
                dp[j][i] = p * (dp[j][i] * factor - means[column]);
            }
        add_products<D, QUERIES>(s, gradient_pairs, dv);
        add_products<D, QUERIES>(dp, query_pairs, dk);
    }
    Out to = dqkv.from(blockIdx.z * tokens * 3 * c + head * width);
    float one[2] = {1.0f, 1.0f}, factor[2] = {scale, scale};
    store_rows<D>(to.from(c), 3 * c, first, tokens, width, factor, dk);
    store_rows<D>(to.from(2 * c), 3 * c, first, tokens, width, one, dv);
}

#define ATTENTION_MMA(D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS)                                                             \
        attention_bf16_##D(In qkv, Out o, float *lse, int tokens, int c, int heads, const Control *control,  \
                           u32 purpose, u32 threshold, float scale) {                                                     \
        attention_mma_forward<D>(qkv, o, lse, tokens, c, heads, control, Drop{purpose, threshold, scale});                \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS)                                                             \
        attention_bf16_dq_##D(In qkv, const float *lse, const float *delta, In d_o, Out dqkv,      \
                              int tokens, int c, int heads, const Control *control, u32 purpose, u32 threshold,           \
                              float scale) {                                                                              \
        attention_mma_dq<D>(qkv, lse, delta, d_o, dqkv, tokens, c, heads, control, Drop{purpose, threshold, scale});      \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(MMA_THREADS)                                                             \
        attention_bf16_dkv_##D(In qkv, const float *lse, const float *delta, In d_o, Out dqkv,     \
                               int tokens, int c, int heads, const Control *control, u32 purpose, u32 threshold,          \
                               float scale) {                                                                             \
        attention_mma_dkv<D>(qkv, lse, delta, d_o, dqkv, tokens, c, heads, control, Drop{purpose, threshold, scale});     \
    }

#ifdef ATTENTION_BF16_16
ATTENTION_MMA(16)
#endif
#ifdef ATTENTION_BF16_32
ATTENTION_MMA(32)
#endif
#ifdef ATTENTION_BF16_64
ATTENTION_MMA(64)
#endif
#ifdef ATTENTION_BF16_128
ATTENTION_MMA(128)
#endif
