// Samplers' arithmetic between two runs of a network, as the host has it (ddpm_engine::vectors): in f64 or f32 as there, each
// operation rounded by itself, so that products and sums must not become one instruction. `draws.cu` has the normal numbers.

// to = (sum of c v) / divisor. `to` may be v0.
extern "C" __global__ void vector_mix(float *to, int n, double divisor, int terms, const float *v0, double c0, const float *v1,
                                      double c1, const float *v2, double c2, const float *v3, double c3) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) {
        double sum = terms > 0 ? __dmul_rn(c0, (double)v0[i]) : 0.0;
        if (terms > 1) sum = __dadd_rn(sum, __dmul_rn(c1, (double)v1[i]));
        if (terms > 2) sum = __dadd_rn(sum, __dmul_rn(c2, (double)v2[i]));
        if (terms > 3) sum = __dadd_rn(sum, __dmul_rn(c3, (double)v3[i]));
        to[i] = (float)(divisor == 1.0 ? sum : __ddiv_rn(sum, divisor));
    }
}

// v = exp((p ln large + (1 - p) ln small) / 2) z, p = (v + 1) / 2.
extern "C" __global__ void vector_deviate(float *v, const float *z, int n, double ln_small, double ln_large) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) {
        double p = ((double)v[i] + 1.0) / 2.0;
        double variance = __dadd_rn(__dmul_rn(p, ln_large), __dmul_rn(1.0 - p, ln_small));
        v[i] = (float)(exp(0.5 * variance) * (double)z[i]);
    }
}

// y = u + scale (y - u)
extern "C" __global__ void vector_extrapolate(float *y, const float *u, int n, float scale) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid())
        y[i] = __fadd_rn(u[i], __fmul_rn(scale, __fsub_rn(y[i], u[i])));
}

// ------------------------------------------------------------------------------------------------------- thresholds

__device__ __forceinline__ float held(float x, float most) { return __fdiv_rn(x < -most ? -most : x > most ? most : x, most); }

extern "C" __global__ void vector_clip(float *x, int n) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) x[i] = held(x[i], 1.0f);
}

// The bits of a number's size: they have the order of the sizes, with what is not a number behind infinity.
__device__ __forceinline__ u32 size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Holds an image's numbers within what a part of them does not exceed: between the sizes of rank `low` and `high`, counted
// from 0 and found bit by bit, from the highest on. The rank of a size is how many are less. A block has an image.
extern "C" __global__ void vector_clip_dynamic(float *x, int image, int low, int high, float fraction) {
    __shared__ double shared[32];
    x += (u64)blockIdx.x * image;
    u32 at_low = 0, at_high = 0;
    for (int bit = 30; bit >= 0; bit--) {
        u32 of_low = at_low | 1u << bit, of_high = at_high | 1u << bit;
        double below_low = 0.0, below_high = 0.0;
        for (int i = threadIdx.x; i < image; i += blockDim.x) {
            u32 bits = size_bits(x[i]);
            below_low += bits < of_low ? 1.0 : 0.0;
            below_high += bits < of_high ? 1.0 : 0.0;
        }
        if (block_sum(below_low, shared) <= (double)low) at_low = of_low;
        if (block_sum(below_high, shared) <= (double)high) at_high = of_high;
    }
    float a = __uint_as_float(at_low), b = __uint_as_float(at_high);
    float most = fmaxf(__fadd_rn(a, __fmul_rn(__fsub_rn(b, a), fraction)), 1.0f);
    for (int i = threadIdx.x; i < image; i += blockDim.x) x[i] = held(x[i], most);
}
