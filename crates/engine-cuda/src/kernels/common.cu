// Prefix of every kernel source: types, the control block, Philox, reductions, tensor cores.
//
// `DDPM_EMULATOR` is defined when the same text is compiled as C++ for the CPU (tests/emulator), with threads as fibers.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// Everything that changes from run to run; written before each run, so that launches (and graphs of them) stay the same.
// Mirrored in `control.rs`.
struct Control {
    u32 seed[2];
    u32 step;
    u32 first_index;
    float rate, root, eps, share1, beta2, share2, decay, shrink, ema_share, scale;
    u32 skipped;
    float loss;
    double squared_norm;
};

__device__ __forceinline__ int grid_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int grid_size() { return gridDim.x * blockDim.x; }
__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// -------------------------------------------------------------------------------------------------------- tensors

// Tensors are f32, or bf16 if the lowest bit of the address is set (every tensor is aligned to 64 bytes). Kernels compute in f32.

// Rounds two elements to bf16 (to nearest, ties to even), the first in the lower half.
#ifdef DDPM_EMULATOR
u32 pack_bf16(float low, float high);
#else
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

__device__ __forceinline__ float low_bf16(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(u32 word) { return __uint_as_float(word & 0xffff0000u); }

// A tensor to read.
struct In {
    u64 address;

    __device__ __forceinline__ bool is_bf16() const { return address & 1; }
    __device__ __forceinline__ const float *f32_ptr() const { return (const float *)address; }
    __device__ __forceinline__ const unsigned short *bf16_ptr() const { return (const unsigned short *)(address - 1); }

    __device__ __forceinline__ float operator[](int i) const {
        return is_bf16() ? __uint_as_float((u32)bf16_ptr()[i] << 16) : f32_ptr()[i];
    }

    // Loads V elements starting at i, a multiple of V: 1, 2, 4 or 8.
    template <int V> __device__ __forceinline__ void get(int i, float (&v)[V]) const {
        if constexpr (V == 1) {
            v[0] = (*this)[i];
        } else if (is_bf16()) {
            u32 words[V / 2];
            if constexpr (V == 8) {
                uint4 w = *(const uint4 *)(bf16_ptr() + i);
                words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
            } else if constexpr (V == 4) {
                uint2 w = *(const uint2 *)(bf16_ptr() + i);
                words[0] = w.x, words[1] = w.y;
            } else {
                words[0] = *(const u32 *)(bf16_ptr() + i);
            }
#pragma unroll
            for (int j = 0; j < V / 2; j++) {
                v[2 * j] = low_bf16(words[j]);
                v[2 * j + 1] = high_bf16(words[j]);
            }
        } else if constexpr (V == 2) {
            float2 f = *(const float2 *)(f32_ptr() + i);
            v[0] = f.x;
            v[1] = f.y;
        } else {
#pragma unroll
            for (int j = 0; j < V / 4; j++) {
                float4 f = *(const float4 *)(f32_ptr() + i + 4 * j);
                v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
            }
        }
    }

    // The tensor starting at element i.
    __device__ __forceinline__ In from(int i) const { return In{address + (u64)i * (is_bf16() ? 2 : 4)}; }
};

// A tensor to write.
struct Out {
    u64 address;

    __device__ __forceinline__ bool is_bf16() const { return address & 1; }
    __device__ __forceinline__ float *f32_ptr() const { return (float *)address; }
    __device__ __forceinline__ unsigned short *bf16_ptr() const { return (unsigned short *)(address - 1); }

    __device__ __forceinline__ void set(int i, float v) const {
        if (is_bf16())
            bf16_ptr()[i] = (unsigned short)pack_bf16(v, 0.0f);
        else
            f32_ptr()[i] = v;
    }

    // Counterpart of `In::get`.
    template <int V> __device__ __forceinline__ void set(int i, const float (&v)[V]) const {
        if constexpr (V == 1) {
            set(i, v[0]);
        } else if (is_bf16()) {
            u32 words[V / 2];
#pragma unroll
            for (int j = 0; j < V / 2; j++) words[j] = pack_bf16(v[2 * j], v[2 * j + 1]);
            if constexpr (V == 8)
                *(uint4 *)(bf16_ptr() + i) = make_uint4(words[0], words[1], words[2], words[3]);
            else if constexpr (V == 4)
                *(uint2 *)(bf16_ptr() + i) = make_uint2(words[0], words[1]);
            else
                *(u32 *)(bf16_ptr() + i) = words[0];
        } else if constexpr (V == 2) {
            *(float2 *)(f32_ptr() + i) = make_float2(v[0], v[1]);
        } else {
#pragma unroll
            for (int j = 0; j < V / 4; j++)
                *(float4 *)(f32_ptr() + i + 4 * j) = make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
        }
    }

    __device__ __forceinline__ Out from(int i) const { return Out{address + (u64)i * (is_bf16() ? 2 : 4)}; }
};

// ------------------------------------------------------------------------------------------------- random numbers

// Philox 4x32 (Salmon et al. 2011) with 10 rounds, as in ddpm_kernels::random; 7 rounds for dropout masks of attention weights.
__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1, int rounds = 10) {
    for (int round = 0; round < rounds; round++) {
        u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
        u32 n0 = (u32)(p1 >> 32) ^ c1 ^ k0, n2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c0 = n0;
        c1 = (u32)p1;
        c2 = n2;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// Dropout factor: 0 for a dropped element, else `scale`.
__device__ __forceinline__ float drop_or_scale(u32 word, u32 threshold, float scale) { return word < threshold ? 0.0f : scale; }

// Dropout of a head's attention weights, as ddpm_kernels::random::Dropout::weight_factor. No dropout: threshold 0, scale 1.
struct Dropout {
    u32 purpose, threshold;
    float scale;
    int image;
};

// Not inlined: it is called in unrolled loops and usually disabled.
__device__ __noinline__ float draw_dropout_factor(Dropout drop, const Control *control, int head, int tokens, int query, int key) {
    u32 first = (u32)((head * tokens + query) * ceil_div(tokens, 8) + key / 8);
    uint4 words = philox(first, control->first_index + drop.image, control->step, drop.purpose, control->seed[0], control->seed[1], 7);
    int j = key % 8 / 2;
    u32 word = j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
    return drop_or_scale(key % 2 ? word >> 16 : word & 0xffff, drop.threshold, drop.scale);
}

__device__ __forceinline__ float dropout_factor(const Dropout &drop, const Control *control, int head, int tokens, int query, int key) {
    return drop.threshold == 0 ? drop.scale : draw_dropout_factor(drop, control, head, tokens, query, key);
}

// Selects one of two types.
template <bool FIRST, class A, class B> struct Conditional {
    typedef A Type;
};
template <class A, class B> struct Conditional<false, A, B> {
    typedef B Type;
};

// ------------------------------------------------------------------------------------------------------ reductions

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

__device__ __forceinline__ double warp_sum(double v) {
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

// Sum over all threads of a one-dimensional block (full warps), returned to every thread; the order is fixed.
template <class T> __device__ __forceinline__ T block_sum(T v, T *shared) {
    v = warp_sum(v);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < warps; i++) total += shared[i];
    return total;
}

// Whether this is the last of `count` blocks to arrive, returned to every thread; earlier writes of all blocks are then visible.
// The counter is 0 before and after. Sums computed by the last block have a fixed order, whichever block it is.
__device__ __forceinline__ bool last_block(u32 *counter, u32 count, int *shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        *shared = atomicAdd(counter, 1u) == count - 1;
        if (*shared) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return *shared;
}

// Sums v over all threads of a grid of one-dimensional blocks. Returns true, with the sum in v, in the threads of one block only.
__device__ __forceinline__ bool sum_of_grid(double &v, double *parts, u32 *counter) {
    __shared__ double shared[32];
    __shared__ int flag;
    v = block_sum(v, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = v;
    if (!last_block(counter, gridDim.x, &flag)) return false;
    v = 0.0;
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) v += __ldcg(parts + i);
    v = block_sum(v, shared);
    return true;
}

// Sum over the rows (y) of a block of 32 x ROWS threads, valid in the threads of the first row; the order is fixed.
template <int ROWS, class T> __device__ __forceinline__ T sum_of_rows(T v, T (*shared)[32]) {
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int i = 1; i < ROWS; i++) v += shared[i][threadIdx.x];
    return v;
}

// Sum of column `column` of parts [count, stride], by the rows of a block as above.
template <int ROWS>
__device__ __forceinline__ double sum_of_parts(const float *parts, int count, int stride, int column, bool there,
                                               double (*shared)[32]) {
    double sum = 0.0;
    if (there)
#pragma unroll 4
        for (int i = threadIdx.y; i < count; i += ROWS) sum += (double)__ldcg(parts + i * stride + column);
    return sum_of_rows<ROWS>(sum, shared);
}

// Sums K values per channel over rows, in runs: blocks (x: 32 V channels, y: run) of 32 x 8 threads, partial sums
// parts [run, K, c], one counter per x. `add` accumulates row r, channels ch .. ch + V; the last block calls `finish` with each
// channel's sums. V is 4 if c is a multiple of 4, else 1.
template <int V, int K, class Add, class Finish>
__device__ __forceinline__ void sum_columns(int rows, int c, int run, float *parts, u32 *counter, Add add, Finish finish) {
    __shared__ double shared[8][32];
    __shared__ int flag;
    int ch = (blockIdx.x * 32 + threadIdx.x) * V, last = min(rows, (int)(blockIdx.y + 1) * run), runs = gridDim.y;
    float sums[K][V];
    double totals[K][V];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < V; j++) sums[k][j] = 0.0f;
    if (ch < c)
#pragma unroll 4
        for (int r = blockIdx.y * run + threadIdx.y; r < last; r += 8) add(r, ch, sums);
    for (int k = 0; k < K; k++)
        for (int j = 0; j < V; j++) {
            totals[k][j] = sum_of_rows<8>((double)sums[k][j], shared);
            if (runs > 1 && threadIdx.y == 0 && ch < c) parts[(blockIdx.y * K + k) * c + ch + j] = (float)totals[k][j];
        }
    if (runs > 1) {
        if (!last_block(counter, runs, &flag)) return;
        for (int k = 0; k < K; k++)
            for (int j = 0; j < V; j++) totals[k][j] = sum_of_parts<8>(parts, runs, K * c, k * c + ch + j, ch < c, shared);
    }
    if (threadIdx.y > 0 || ch >= c) return;
    for (int j = 0; j < V; j++) {
        double of_channel[K];
        for (int k = 0; k < K; k++) of_channel[k] = totals[k][j];
        finish(ch + j, of_channel);
    }
}

// ------------------------------------------------------------------------------------------- activation functions

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ float silu_grad(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// ---------------------------------------------------------------------------------------------------- tensor cores

// Fragments of `mma.sync` by lane (PTX ISA, "Matrix fragments for mma"): with g = lane / 4, t = lane % 4, in 32-bit words (one
// tf32 element, or two bf16 elements adjacent along k):
//   a[0..4]: (row g, word t), (row g + 8, word t), (row g, word t + 4), (row g + 8, word t + 4)
//   b[0..2]: (word t, column g), (word t + 4, column g)
//   d[0..4]: (row g, column 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)

// Asynchronous 16-byte copies to shared memory, in groups; zeros unless `there`. `wait_copies<N>` waits for all but the thread's
// last N groups; a barrier makes them visible to other threads.
//
// `load_matrices`: four 8 x 8 bf16 matrices (PTX ISA, "ldmatrix"). Lane l provides the address of row l % 8 of matrix l / 8;
// matrix i goes to to[i], in which a lane holds word t of row g, or, transposed, rows 2 t and 2 t + 1 of column g.

#ifdef DDPM_EMULATOR
void copy_16(void *to, const void *from, bool there);
void commit_copies();
void wait_copies_except(int groups);
template <int N> void wait_copies() { wait_copies_except(N); }
void load_matrices(u32 (&to)[4], const void *row);
void load_matrices_transposed(u32 (&to)[4], const void *row);
u32 round_tf32(float x);
void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
#else
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&to)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ u32 round_tf32(float x) {
    u32 word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
    return word;
}

// d += a b, 16 x 16 by 16 x 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, 16 x 8 by 8 x 8.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
