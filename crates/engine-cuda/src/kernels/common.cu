// What every kernel source begins with: types, the control block, Philox, sums over a block, tensor cores.
//
// `DDPM_EMULATOR` is set where the same text is compiled as C++ for the CPU (tests/emulator), with threads as fibers.

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// What changes from run to run; written before each run, so that launches (and graphs of them) stay the same.
// `control.rs` has the same layout.
struct Control {
    u32 seed[2];
    u32 step;
    u32 first_index;
    float rate, root, eps, share1, beta2, share2, decay, shrink, ema_share, scale;
    u32 held;
    float loss;
    double squared_norm;
};

__device__ __forceinline__ int thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int threads_of_grid() { return gridDim.x * blockDim.x; }
__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --------------------------------------------------------------------------------------------------------- numbers

// Tensors are of f32, or of bf16 where the lowest bit of the address is set (every tensor begins at a multiple of 64
// bytes). Kernels compute in f32.

// Two numbers rounded to bf16 (to nearest, ties to even), the first in the lower half.
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

// A tensor that is read.
struct In {
    u64 address;

    __device__ __forceinline__ bool half() const { return address & 1; }
    __device__ __forceinline__ const float *floats() const { return (const float *)address; }
    __device__ __forceinline__ const unsigned short *halves() const { return (const unsigned short *)(address - 1); }

    __device__ __forceinline__ float operator[](int i) const {
        return half() ? __uint_as_float((u32)halves()[i] << 16) : floats()[i];
    }

    // V numbers from i on, a multiple of V: 1, 2, 4 or 8.
    template <int V> __device__ __forceinline__ void get(int i, float (&v)[V]) const {
        if constexpr (V == 1) {
            v[0] = (*this)[i];
        } else if (half()) {
            u32 words[V / 2];
            if constexpr (V == 8) {
                uint4 w = *(const uint4 *)(halves() + i);
                words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
            } else if constexpr (V == 4) {
                uint2 w = *(const uint2 *)(halves() + i);
                words[0] = w.x, words[1] = w.y;
            } else {
                words[0] = *(const u32 *)(halves() + i);
            }
#pragma unroll
            for (int j = 0; j < V / 2; j++) {
                v[2 * j] = low_bf16(words[j]);
                v[2 * j + 1] = high_bf16(words[j]);
            }
        } else if constexpr (V == 2) {
            float2 f = *(const float2 *)(floats() + i);
            v[0] = f.x;
            v[1] = f.y;
        } else {
#pragma unroll
            for (int j = 0; j < V / 4; j++) {
                float4 f = *(const float4 *)(floats() + i + 4 * j);
                v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
            }
        }
    }

    // The tensor from number i on.
    __device__ __forceinline__ In from(int i) const { return In{address + (u64)i * (half() ? 2 : 4)}; }
};

// A tensor that is written.
struct Out {
    u64 address;

    __device__ __forceinline__ bool half() const { return address & 1; }
    __device__ __forceinline__ float *floats() const { return (float *)address; }
    __device__ __forceinline__ unsigned short *halves() const { return (unsigned short *)(address - 1); }

    __device__ __forceinline__ void set(int i, float v) const {
        if (half())
            halves()[i] = (unsigned short)pack_bf16(v, 0.0f);
        else
            floats()[i] = v;
    }

    // As `In::get`.
    template <int V> __device__ __forceinline__ void set(int i, const float (&v)[V]) const {
        if constexpr (V == 1) {
            set(i, v[0]);
        } else if (half()) {
            u32 words[V / 2];
#pragma unroll
            for (int j = 0; j < V / 2; j++) words[j] = pack_bf16(v[2 * j], v[2 * j + 1]);
            if constexpr (V == 8)
                *(uint4 *)(halves() + i) = make_uint4(words[0], words[1], words[2], words[3]);
            else if constexpr (V == 4)
                *(uint2 *)(halves() + i) = make_uint2(words[0], words[1]);
            else
                *(u32 *)(halves() + i) = words[0];
        } else if constexpr (V == 2) {
            *(float2 *)(floats() + i) = make_float2(v[0], v[1]);
        } else {
#pragma unroll
            for (int j = 0; j < V / 4; j++)
                *(float4 *)(floats() + i + 4 * j) = make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
        }
    }

    __device__ __forceinline__ Out from(int i) const { return Out{address + (u64)i * (half() ? 2 : 4)}; }
};

// ------------------------------------------------------------------------------------------------- random numbers

// Philox 4x32 (Salmon et al. 2011) of 10 rounds, as ddpm_kernels::random; of 7 for the masks of attention's weights.
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

// 0 for a dropped number, else `scale`.
__device__ __forceinline__ float keep(u32 word, u32 threshold, float scale) { return word < threshold ? 0.0f : scale; }

// Dropout's factors of a head's weights, as ddpm_kernels::random::Dropout::weight_factor. No dropout: threshold 0, scale 1.
struct Drop {
    u32 purpose, threshold;
    float scale;
    int image;
};

// A call, because kernels ask for many factors in unrolled loops, and mostly for none.
__device__ __noinline__ float draw_factor(Drop drop, const Control *control, int head, int tokens, int query, int key) {
    u32 first = (u32)((head * tokens + query) * ceil_div(tokens, 8) + key / 8);
    uint4 words = philox(first, control->first_index + drop.image, control->step, drop.purpose, control->seed[0], control->seed[1], 7);
    int j = key % 8 / 2;
    u32 word = j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
    return keep(key % 2 ? word >> 16 : word & 0xffff, drop.threshold, drop.scale);
}

__device__ __forceinline__ float drop_factor(const Drop &drop, const Control *control, int head, int tokens, int query, int key) {
    return drop.threshold == 0 ? drop.scale : draw_factor(drop, control, head, tokens, query, key);
}

// One of two types.
template <bool FIRST, class A, class B> struct Choose {
    typedef A Type;
};
template <class A, class B> struct Choose<false, A, B> {
    typedef B Type;
};

// ------------------------------------------------------------------------------------------------ sums of a block

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

__device__ __forceinline__ double warp_sum(double v) {
    for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}

// The sum over all threads of a one-dimensional block (whole warps), in every thread; always in the same order.
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

// Whether this block is the last of `count` to come here, in every thread: what all of them wrote before is there then. The
// counter is 0 before and after. Sums that the last block makes are in a fixed order, whichever it is.
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

// Sums v over all threads of a grid of one-dimensional blocks. Only the threads of one block get `true`, and the sum.
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

// The sum over the rows (y) of a block of 32 x ROWS threads, in the threads of the first row; always in the same order.
template <int ROWS, class T> __device__ __forceinline__ T sum_of_rows(T v, T (*shared)[32]) {
    __syncthreads();
    shared[threadIdx.y][threadIdx.x] = v;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int i = 1; i < ROWS; i++) v += shared[i][threadIdx.x];
    return v;
}

// The sum of column `column` of parts [count, stride], by the rows of a block as above.
template <int ROWS>
__device__ __forceinline__ double sum_of_parts(const float *parts, int count, int stride, int column, bool there,
                                               double (*shared)[32]) {
    double sum = 0.0;
    if (there)
#pragma unroll 4
        for (int i = threadIdx.y; i < count; i += ROWS) sum += (double)__ldcg(parts + i * stride + column);
    return sum_of_rows<ROWS>(sum, shared);
}

// Sums over rows of K numbers for each channel, in runs: blocks (x: 32 V channels, y: run) of 32 x 8 threads, parts [run, K, c], a
// counter for each x. `add` adds what a thread has of row r, channels ch .. ch + V; the last block's `finish` gets each
// channel's sums. V is 4 where c is a multiple of it, else 1.
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

__device__ __forceinline__ float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// ---------------------------------------------------------------------------------------------------- tensor cores

// Fragments of `mma.sync`, lane by lane (PTX ISA, "Matrix fragments for mma"): with g = lane / 4, t = lane % 4, words of
// 32 bits (one tf32 number, or two bf16 numbers of neighbouring k):
//   a[0..4]: (row g, word t), (row g + 8, word t), (row g, word t + 4), (row g + 8, word t + 4)
//   b[0..2]: (word t, column g), (word t + 4, column g)
//   d[0..4]: (row g, column 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)

// Copies of 16 bytes to shared memory that go on by themselves, in groups; zeros where nothing is `there`. `wait_copies<N>`
// waits for all but the thread's last N groups; a barrier shows them to others.
//
// `load_matrices`: four matrices of 8 x 8 numbers of bf16 (PTX ISA, "ldmatrix"). Lane l says where row l % 8 of matrix l / 8
// lies; matrix i becomes to[i], in which a lane has word t of row g, or, transposed, rows 2 t and 2 t + 1 of column g.

#ifdef DDPM_EMULATOR
void copy_16(void *to, const void *from, bool there);
void commit_copies();
void wait_copies_but(int groups);
template <int N> void wait_copies() { wait_copies_but(N); }
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
