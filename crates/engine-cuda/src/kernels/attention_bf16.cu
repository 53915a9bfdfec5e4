// Multi-head self-attention on tensor cores: tensors and operands in bf16, accumulation and softmax in f32; shapes as in
// attention.cu.
//
// A warp holds 16 queries (or, for dk and dv, keys) in registers; a block is four warps. The scores of a tile of keys stay in
// registers and become the A operand of the next product in place, because the result fragments of two adjacent tiles of 8
// columns form the A fragment of 16 columns (mma, common.cu). D is at least the head's width and a multiple of 16; the width is a
// multiple of 8.
//
// Tiles of tokens keep their global layout in shared memory, [token][D]; one tile serves products along the width (ldmatrix) and
// along the tokens (ldmatrix.trans). The next tile is copied while the current one is multiplied.

#define BF16_THREADS 128
// Tokens per block.
#define BF16_ROWS 64

template <int D> struct Tokens {
    // Tokens per tile, for kernels that hold one accumulator of width D per row, and two.
    static const int ONE = D > 64 ? 32 : 64, TWO = D > 64 ? 16 : 32;
    static const int PER_ROW = D / 8;

    // Swizzles 16-byte chunks so that the eight rows of a matrix are in different banks.
    __device__ static __forceinline__ int swizzle(int row, int chunk) {
        if constexpr (PER_ROW >= 8)
            return row * PER_ROW + (chunk ^ (row & 7));
        else
            return row * PER_ROW + (chunk ^ (row / (8 / PER_ROW) & (PER_ROW - 1)));
    }
};

// One head's slice of a tensor: its first element, and the stride between tokens.
struct Head {
    const unsigned short *from;
    int stride;
};

// Starts the copy of ROWS tokens.
template <int D, int ROWS>
__device__ __forceinline__ void copy_tokens(Head x, int first, int tokens, int width, uint4 *tile) {
    for (int i = threadIdx.x; i < ROWS * D / 8; i += BF16_THREADS) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool there = first + row < tokens && chunk * 8 < width;
        const unsigned short *from = there ? x.from + (first + row) * x.stride + chunk * 8 : x.from;
        copy_16(tile + Tokens<D>::swizzle(row, chunk), from, there);
    }
}

// The same for two tensors.
template <int D, int ROWS>
__device__ __forceinline__ void copy_pair(Head a, Head b, int first, int tokens, int width, uint4 *to_a, uint4 *to_b) {
    copy_tokens<D, ROWS>(a, first, tokens, width, to_a);
    copy_tokens<D, ROWS>(b, first, tokens, width, to_b);
}

// A warp's 16 rows `first ..` as A fragments.
template <int D>
__device__ __forceinline__ void load_a_fragments(Head x, int first, int tokens, int width, u32 (&to)[D / 16][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first + g + i % 2 * 8, d = k * 16 + i / 2 * 8 + 2 * t;
            to[k][i] = row < tokens && d < width ? *(const u32 *)(x.from + row * x.stride + d) : 0;
        }
}

// s[row, column] = sum over the width of left[row] tile[column].
template <int D, int COLUMNS>
__device__ __forceinline__ void scores(const u32 (&left)[D / 16][4], const uint4 *tile, float (&s)[COLUMNS / 8][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++) {
            u32 words[4];
            load_matrices(words, tile + Tokens<D>::swizzle(j * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
            u32 first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
            mma_bf16(s[2 * j], left[k], first);
            mma_bf16(s[2 * j + 1], left[k], second);
        }
}

// Masks keys beyond the last token.
template <int KEYS> __device__ __forceinline__ void mask(int tile, int tokens, float (&s)[KEYS / 8][4]) {
    if (tile + KEYS <= tokens) return;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (tile + j * 8 + threadIdx.x % 4 * 2 + i % 2 >= tokens) s[j][i] = -INFINITY;
}

// sum[row] += sum over columns of p[row, column] tile[column].
template <int D, int COLUMNS>
__device__ __forceinline__ void add_products(const float (&p)[COLUMNS / 8][4], const uint4 *tile, float (&sum)[D / 8][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        u32 left[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                       pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 words[4];
            load_matrices_transposed(words, tile + Tokens<D>::swizzle(k * 16 + lane % 16, j * 2 + lane / 16));
            u32 first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
            mma_bf16(sum[2 * j], left, first);
            mma_bf16(sum[2 * j + 1], left, second);
        }
    }
}

// Stores a warp's 16 result rows, scaled by a factor for each of the lane's two rows.
template <int D>
__device__ __forceinline__ void store_rows(Out to, int stride, int first, int tokens, int width, const float (&factor)[2],
                                           const float (&sum)[D / 8][4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + g + r * 8, d = j * 8 + 2 * t;
            float v[2] = {sum[j][2 * r] * factor[r], sum[j][2 * r + 1] * factor[r]};
            if (row < tokens && d < width) to.set<2>(row * stride + d, v);
        }
}

template <int D> __device__ __forceinline__ void clear(float (&sum)[D / 8][4]) {
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
}

// Locates the block's head in qkv (part 0, 1 or 2), in o, and in per-query values.
struct HeadOf {
    int tokens, c, heads, width;

    __device__ __forceinline__ Head of_qkv(In qkv, int part) const {
        return Head{qkv.bf16_ptr() + (u64)blockIdx.z * tokens * 3 * c + part * c + blockIdx.y * width, 3 * c};
    }
    __device__ __forceinline__ Head of_o(In o) const {
        return Head{o.bf16_ptr() + (u64)blockIdx.z * tokens * c + blockIdx.y * width, c};
    }
    __device__ __forceinline__ Out in_qkv(Out qkv, int part) const {
        return qkv.from(blockIdx.z * tokens * 3 * c + part * c + blockIdx.y * width);
    }
    __device__ __forceinline__ int of_query(int query) const { return (blockIdx.z * tokens + query) * heads + blockIdx.y; }
};

#define LOG2_E 1.4426950408889634f
#define LN_2 0.69314718055994531f

// Block x: queries; y: head; z: image.
template <int D>
__device__ __forceinline__ void attention_bf16_forward(In qkv, Out o, float *lse, HeadOf head, const Control *control, Dropout drop) {
    const int KEYS = Tokens<D>::ONE, CHUNKS = KEYS * D / 8;
    __shared__ uint4 keys[2][CHUNKS], values[2][CHUNKS];
    int tokens = head.tokens, width = head.width, first = blockIdx.x * BF16_ROWS + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Head k = head.of_qkv(qkv, 1), v = head.of_qkv(qkv, 2);
    float scale = LOG2_E / sqrtf((float)width);
    u32 q[D / 16][4];
    load_a_fragments<D>(head.of_qkv(qkv, 0), first, tokens, width, q);
    float sum[D / 8][4], row_max[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    clear<D>(sum);
    copy_pair<D, KEYS>(k, v, 0, tokens, width, keys[0], values[0]);
    commit_copies();
    for (int tile = 0, buffer = 0; tile < tokens; tile += KEYS, buffer ^= 1) {
        if (tile + KEYS < tokens) copy_pair<D, KEYS>(k, v, tile + KEYS, tokens, width, keys[buffer ^ 1], values[buffer ^ 1]);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        float s[KEYS / 8][4];
        scores<D, KEYS>(q, keys[buffer], s);
        mask<KEYS>(tile, tokens, s);
        float new_max[2] = {row_max[0], row_max[1]}, rescale[2], shift[2];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) new_max[i / 2] = fmaxf(new_max[i / 2], s[j][i]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Reduce over the four lanes of a row.
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 1));
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 2));
            rescale[r] = exp2f((row_max[r] - new_max[r]) * scale);
            row_max[r] = new_max[r];
            shift[r] = new_max[r] * scale;
            total[r] *= rescale[r];
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[j][i] *= rescale[i / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = exp2f(fmaf(s[j][i], scale, -shift[i / 2]));
                total[i / 2] += s[j][i];
            }
        if (drop.threshold != 0) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    s[j][i] *= draw_dropout_factor(drop, control, blockIdx.y, tokens, first + g + i / 2 * 8, tile + j * 8 + 2 * t + i % 2);
        }
        add_products<D, KEYS>(s, values[buffer], sum);
        __syncthreads();
    }
    wait_copies<0>();
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        factor[r] = 1.0f / total[r];
        int query = first + g + r * 8;
        if (t == 0 && query < tokens) lse[head.of_query(query)] = (row_max[r] * scale + log2f(total[r])) * LN_2;
    }
    store_rows<D>(o.from(blockIdx.z * tokens * head.c + blockIdx.y * width), head.c, first, tokens, width, factor, sum);
}

// dq = sum over keys of ds k / sqrt(width), ds = p (D (do . v) - delta).
template <int D>
__device__ __forceinline__ void attention_bf16_dq(In qkv, const float *lse, const float *delta, In d_o, Out dqkv, HeadOf head,
                                                  const Control *control, Dropout drop) {
    const int KEYS = Tokens<D>::TWO, CHUNKS = KEYS * D / 8;
    __shared__ uint4 keys[2][CHUNKS], values[2][CHUNKS];
    int tokens = head.tokens, width = head.width, first = blockIdx.x * BF16_ROWS + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Head k = head.of_qkv(qkv, 1), v = head.of_qkv(qkv, 2);
    float scale = 1.0f / sqrtf((float)width);
    u32 q[D / 16][4], gradient[D / 16][4];
    load_a_fragments<D>(head.of_qkv(qkv, 0), first, tokens, width, q);
    load_a_fragments<D>(head.of_o(d_o), first, tokens, width, gradient);
    float sum[D / 8][4], log2_total[2], mean[2];
    clear<D>(sum);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = first + g + r * 8, at = head.of_query(query);
        log2_total[r] = query < tokens ? lse[at] * LOG2_E : 0.0f;
        mean[r] = query < tokens ? delta[at] : 0.0f;
    }
    copy_pair<D, KEYS>(k, v, 0, tokens, width, keys[0], values[0]);
    commit_copies();
    for (int tile = 0, buffer = 0; tile < tokens; tile += KEYS, buffer ^= 1) {
        if (tile + KEYS < tokens) copy_pair<D, KEYS>(k, v, tile + KEYS, tokens, width, keys[buffer ^ 1], values[buffer ^ 1]);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        float s[KEYS / 8][4], dp[KEYS / 8][4];
        scores<D, KEYS>(q, keys[buffer], s);
        scores<D, KEYS>(gradient, values[buffer], dp);
        mask<KEYS>(tile, tokens, s);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p = exp2f(fmaf(s[j][i], LOG2_E * scale, -log2_total[i / 2]));
                int query = first + g + i / 2 * 8, key = tile + j * 8 + 2 * t + i % 2;
                float factor = dropout_factor(drop, control, blockIdx.y, tokens, query, key);
                s[j][i] = p * (dp[j][i] * factor - mean[i / 2]);
            }
        add_products<D, KEYS>(s, keys[buffer], sum);
        __syncthreads();
    }
    wait_copies<0>();
    float factor[2] = {scale, scale};
    store_rows<D>(head.in_qkv(dqkv, 0), 3 * head.c, first, tokens, width, factor, sum);
}

// dk = sum over queries of ds q / sqrt(width), dv = sum over queries of p D do. Rows are keys, columns are queries.
template <int D>
__device__ __forceinline__ void attention_bf16_dkv(In qkv, const float *lse, const float *delta, In d_o, Out dqkv, HeadOf head,
                                                   const Control *control, Dropout drop) {
    const int QUERIES = Tokens<D>::TWO, CHUNKS = QUERIES * D / 8;
    __shared__ uint4 queries[2][CHUNKS], gradients[2][CHUNKS];
    __shared__ float logs[2][QUERIES], means[2][QUERIES];
    int tokens = head.tokens, width = head.width, first = blockIdx.x * BF16_ROWS + threadIdx.x / 32 * 16;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Head q = head.of_qkv(qkv, 0), gradient = head.of_o(d_o);
    float scale = 1.0f / sqrtf((float)width);
    u32 k[D / 16][4], v[D / 16][4];
    load_a_fragments<D>(head.of_qkv(qkv, 1), first, tokens, width, k);
    load_a_fragments<D>(head.of_qkv(qkv, 2), first, tokens, width, v);
    float dk[D / 8][4], dv[D / 8][4];
    clear<D>(dk);
    clear<D>(dv);
    auto copy = [&](int tile, int buffer) {
        copy_pair<D, QUERIES>(q, gradient, tile, tokens, width, queries[buffer], gradients[buffer]);
        if (threadIdx.x < QUERIES) {
            int query = tile + threadIdx.x;
            logs[buffer][threadIdx.x] = query < tokens ? lse[head.of_query(query)] * LOG2_E : INFINITY; // p is 0
            means[buffer][threadIdx.x] = query < tokens ? delta[head.of_query(query)] : 0.0f;
        }
    };
    copy(0, 0);
    commit_copies();
    for (int tile = 0, buffer = 0; tile < tokens; tile += QUERIES, buffer ^= 1) {
        if (tile + QUERIES < tokens) copy(tile + QUERIES, buffer ^ 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        float s[QUERIES / 8][4], dp[QUERIES / 8][4];
        scores<D, QUERIES>(k, queries[buffer], s);
        scores<D, QUERIES>(v, gradients[buffer], dp);
#pragma unroll
        for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = first + g + i / 2 * 8, column = j * 8 + 2 * t + i % 2;
                float p = exp2f(fmaf(s[j][i], LOG2_E * scale, -logs[buffer][column]));
                float factor = dropout_factor(drop, control, blockIdx.y, tokens, tile + column, key);
                s[j][i] = p * factor;
                dp[j][i] = p * (dp[j][i] * factor - means[buffer][column]);
            }
        add_products<D, QUERIES>(s, gradients[buffer], dv);
        add_products<D, QUERIES>(dp, queries[buffer], dk);
        __syncthreads();
    }
    wait_copies<0>();
    float one[2] = {1.0f, 1.0f}, factor[2] = {scale, scale};
    store_rows<D>(head.in_qkv(dqkv, 1), 3 * head.c, first, tokens, width, factor, dk);
    store_rows<D>(head.in_qkv(dqkv, 2), 3 * head.c, first, tokens, width, one, dv);
}

#define ATTENTION_BF16(D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(BF16_THREADS)                                                            \
        attention_bf16_##D(In qkv, Out o, float *lse, int tokens, int c, int heads, const Control *control, u32 purpose,  \
                           u32 threshold, float scale) {                                                                  \
        attention_bf16_forward<D>(qkv, o, lse, HeadOf{tokens, c, heads, c / heads}, control,                              \
                                  Dropout{purpose, threshold, scale, (int)blockIdx.z});                                                       \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(BF16_THREADS)                                                            \
        attention_bf16_dq_##D(In qkv, const float *lse, const float *delta, In d_o, Out dqkv, int tokens, int c,          \
                              int heads, const Control *control, u32 purpose, u32 threshold, float scale) {               \
        attention_bf16_dq<D>(qkv, lse, delta, d_o, dqkv, HeadOf{tokens, c, heads, c / heads}, control,                    \
                             Dropout{purpose, threshold, scale, (int)blockIdx.z});                                                            \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(BF16_THREADS)                                                            \
        attention_bf16_dkv_##D(In qkv, const float *lse, const float *delta, In d_o, Out dqkv, int tokens, int c,         \
                               int heads, const Control *control, u32 purpose, u32 threshold, float scale) {              \
        attention_bf16_dkv<D>(qkv, lse, delta, d_o, dqkv, HeadOf{tokens, c, heads, c / heads}, control,                   \
                              Dropout{purpose, threshold, scale, (int)blockIdx.z});                                                           \
    }

#ifdef ATTENTION_BF16_16
ATTENTION_BF16(16)
#endif
#ifdef ATTENTION_BF16_32
ATTENTION_BF16(32)
#endif
#ifdef ATTENTION_BF16_64
ATTENTION_BF16(64)
#endif
#ifdef ATTENTION_BF16_128
ATTENTION_BF16(128)
#endif
