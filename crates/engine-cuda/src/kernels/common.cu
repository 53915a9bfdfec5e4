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
    u32 held, unused;
    double squared_norm;
};

__device__ __forceinline__ int thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int threads_of_grid() { return gridDim.x * blockDim.x; }
__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// Dropout's factors of a head's weights, as ddpm_kernels::random::Dropout::weight_factor. The
// picture is blockIdx.z. No dropout: threshold 0, scale 1.
struct Drop {
    u32 purpose, threshold;
    float scale;
};

// A call, because kernels ask for many factors in unrolled loops, and mostly for none.
__device__ __noinline__ float draw_factor(Drop drop, const Control *control, int head, int tokens, int query, int key) {
    u32 first = (u32)((head * tokens + query) * ceil_div(tokens, 8) + key / 8);
    uint4 words = philox(first, control->first_index + blockIdx.z, control->step, drop.purpose, control->seed[0], control->seed[1], 7);
    int j = key % 8 / 2;
    u32 word = j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
    return keep(key % 2 ? word >> 16 : word & 0xffff, drop.threshold, drop.scale);
}

__device__ __forceinline__ float drop_factor(const Drop &drop, const Control *control, int head, int tokens, int query, int key) {
    return drop.threshold == 0 ? drop.scale : draw_factor(drop, control, head, tokens, query, key);
}

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

#ifdef DDPM_EMULATOR
u32 pack_bf16(float low, float high);
u32 round_tf32(float x);
void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
#else
// Two numbers rounded to bf16 (to nearest, ties to even), the first in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
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
