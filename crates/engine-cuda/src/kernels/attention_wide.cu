// Attention in bf16 with heads too wide for registers: batched matrix products, with scores in memory in f32, and softmax kernels
// between them. Tensors as in attention.cu; rows of scores have `stride` elements, a multiple of 8.

// Loads chunks of a matrix in which either k is contiguous, [row][k], or rows are, [k][row].
template <bool ALONG_K> struct Strided {
    typedef typename Conditional<ALONG_K, AlongK<64>, AlongRows<64>>::Type Layout;
    static const int N = BlockTile<64>::PER_THREAD;
    const unsigned short *from;
    int stride, first, rows, k, k_end;

    __device__ __forceinline__ Strided(In x, int offset, int stride, int first, int rows, int k_end)
        : from(x.bf16_ptr() + offset), stride(stride), first(first), rows(rows), k(0), k_end(k_end) {}

    __device__ __forceinline__ void copy(uint4 *tile) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int at = threadIdx.x + i * BlockTile<64>::BLOCK, line = at / Layout::PER_ROW, chunk = at % Layout::PER_ROW;
            int row = first + (ALONG_K ? line : chunk * CHUNK), of_k = k + (ALONG_K ? chunk * CHUNK : line);
            bool there = row < rows && of_k < k_end;
            copy_16(tile + Layout::swizzle(line, chunk), there ? from + (ALONG_K ? row : of_k) * stride + (ALONG_K ? of_k : row) : from,
                    there);
        }
        k += DEPTH;
    }
};

// Stores results: y[row, column] = scale sum.
struct Scaled {
    Out y;
    int offset, stride, m, n;
    float scale;

    __device__ __forceinline__ void store(int row, int column, const float (&v)[2]) const {
        float scaled[2] = {v[0] * scale, v[1] * scale};
        if (row < m && column < n) y.set<2>(offset + row * stride + column, scaled);
    }
};

// A batch of matrices, one per head and image: offset, row stride, and the strides between images and heads.
#define MATRIX(x) int x##_first, int x##_stride, int x##_image, int x##_head
#define OFFSET(x) (x##_first + (int)(blockIdx.z / heads) * x##_image + (int)(blockIdx.z % heads) * x##_head)

// y [m, n] = scale a b; blocks (x: rows, y: columns, z: image and head). a is [m, k], or [k, m] if TRANSPOSED; b is [k, n], or
// [n, k] if BY_ROWS.
#define MATMUL(NAME, TRANSPOSED, BY_ROWS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BlockTile<64>::BLOCK)                                                       \
        matmul_##NAME(In a, In b, Out y, int m, int n, int k, int heads, MATRIX(a), MATRIX(b), MATRIX(y), float scale) {  \
        Strided<!TRANSPOSED> a_chunks(a, OFFSET(a), a_stride, blockIdx.x * 64, m, k);                                         \
        Strided<BY_ROWS> b_chunks(b, OFFSET(b), b_stride, blockIdx.y * 64, n, k);                                             \
        matmul_bf16<64>(a_chunks, b_chunks, Scaled{y, OFFSET(y), y_stride, m, n, scale}, ceil_div(k, DEPTH));                    \
    }

MATMUL(nt, false, true)
MATMUL(nn, false, false)
MATMUL(tn, true, false)

// Softmax of scores [image, head, tokens, stride], one warp per row: p in bf16, zeros beyond the last token, and the logarithm of
// the row's sum. Blocks (x: rows, y: head, z: image) of 32 x 8 threads; `first` is the group's first image.
extern "C" __global__ void attention_weights(const float *scores, Out p, float *lse, int tokens, int stride, int heads, int first,
                                             const Control *control, u32 purpose, u32 threshold, float scale) {
    int query = blockIdx.x * 8 + threadIdx.y, head = blockIdx.y, lane = threadIdx.x;
    if (query >= tokens) return;
    int from = ((blockIdx.z * heads + head) * tokens + query) * stride;
    Dropout drop{purpose, threshold, scale, first + (int)blockIdx.z};
    float row_max = -INFINITY, total = 0.0f;
    for (int i = lane; i < tokens; i += 32) row_max = fmaxf(row_max, scores[from + i]);
    for (int d = 16; d > 0; d >>= 1) row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, d));
    for (int i = lane; i < tokens; i += 32) total += expf(scores[from + i] - row_max);
    total = warp_sum(total);
    for (int i = lane; i < stride; i += 32) {
        float v = i < tokens ? expf(scores[from + i] - row_max) / total * dropout_factor(drop, control, head, tokens, query, i) : 0.0f;
        p.set(from + i, v);
    }
    if (lane == 0) lse[((first + blockIdx.z) * tokens + query) * heads + head] = row_max + logf(total);
}

// From the scores and the gradient dp of the weights: p D, and ds = p (D dp - delta) / sqrt(width), both in bf16.
extern "C" __global__ void attention_weights_grad(const float *scores, const float *dp, const float *lse, const float *delta, Out p,
                                                  Out ds, int tokens, int stride, int heads, int first, float inverse_sqrt_width,
                                                  const Control *control, u32 purpose, u32 threshold, float scale) {
    int query = blockIdx.x * 8 + threadIdx.y, head = blockIdx.y, lane = threadIdx.x;
    if (query >= tokens) return;
    int from = ((blockIdx.z * heads + head) * tokens + query) * stride;
    int row = ((first + blockIdx.z) * tokens + query) * heads + head;
    Dropout drop{purpose, threshold, scale, first + (int)blockIdx.z};
    for (int i = lane; i < stride; i += 32) {
        float weight = i < tokens ? expf(scores[from + i] - lse[row]) : 0.0f;
        float factor = i < tokens ? dropout_factor(drop, control, head, tokens, query, i) : 0.0f;
        p.set(from + i, weight * factor);
        ds.set(from + i, i < tokens ? weight * (dp[from + i] * factor - delta[row]) * inverse_sqrt_width : 0.0f);
    }
}
