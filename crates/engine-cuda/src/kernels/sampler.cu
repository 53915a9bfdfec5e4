// Samplers' arithmetic between runs of a network, as on the host (ddpm_engine::plan_buffers): in f64 or f32 as there, with
// every operation rounded separately, so that products and sums must not be contracted to FMA. Normal samples are in `random.cu`.

// to = (sum of c v) / divisor. `to` may alias v0.
extern "C" __global__ void sampler_linear_combination(float *to, int n, double divisor, int terms, const float *v0, double c0, const float *v1,
                                      double c1, const float *v2, double c2, const float *v3, double c3) {
    for (int i = grid_thread(); i < n; i += grid_size()) {
        double sum = terms > 0 ? __dmul_rn(c0, (double)v0[i]) : 0.0;
        if (terms > 1) sum = __dadd_rn(sum, __dmul_rn(c1, (double)v1[i]));
        if (terms > 2) sum = __dadd_rn(sum, __dmul_rn(c2, (double)v2[i]));
        if (terms > 3) sum = __dadd_rn(sum, __dmul_rn(c3, (double)v3[i]));
        to[i] = (float)(divisor == 1.0 ? sum : __ddiv_rn(sum, divisor));
    }
}

// v = exp((p ln large + (1 - p) ln small) / 2) z, p = (v + 1) / 2.
extern "C" __global__ void sampler_learned_std(float *v, const float *z, int n, double ln_small, double ln_large) {
    for (int i = grid_thread(); i < n; i += grid_size()) {
        double p = ((double)v[i] + 1.0) / 2.0;
        double variance = __dadd_rn(__dmul_rn(p, ln_large), __dmul_rn(1.0 - p, ln_small));
        v[i] = (float)(exp(0.5 * variance) * (double)z[i]);
    }
}

// y = u + scale (y - u)
extern "C" __global__ void sampler_extrapolate(float *y, const float *u, int n, float scale) {
    for (int i = grid_thread(); i < n; i += grid_size())
        y[i] = __fadd_rn(u[i], __fmul_rn(scale, __fsub_rn(y[i], u[i])));
}

// ------------------------------------------------------------------------------------------------------- thresholds

__device__ __forceinline__ float clip_rescale(float x, float limit) { return __fdiv_rn(x < -limit ? -limit : x > limit ? limit : x, limit); }

extern "C" __global__ void sampler_clip(float *x, int n) {
    for (int i = grid_thread(); i < n; i += grid_size()) x[i] = clip_rescale(x[i], 1.0f);
}

// The bits of |x|, which order like |x|, with NaN above infinity.
__device__ __forceinline__ u32 size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Dynamic thresholding: clips an image's elements to a quantile of their absolute values and divides by it. The quantile lies
// between the values of rank `low` and `high` (from 0), found bit by bit from the highest; the rank of a value is the number of
// smaller ones. One block per image.
extern "C" __global__ void sampler_clip_dynamic(float *x, int image, int low, int high, float fraction) {
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
    float limit = fmaxf(__fadd_rn(a, __fmul_rn(__fsub_rn(b, a), fraction)), 1.0f);
    for (int i = threadIdx.x; i < image; i += blockDim.x) x[i] = clip_rescale(x[i], limit);
}
