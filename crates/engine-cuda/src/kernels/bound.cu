// The variational bound as a loss of a learned variance: ddpm_kernels::bound, in f64, number by number.

// What the term of a timestep needs, as a row of the table has it.
struct BoundStep {
    double from_x_t, from_output, posterior_x_0, low, high, decoder;
};

// A term in nats, and its slope by the logarithm of the variance.
struct Term {
    double value, slope;
};

// The share of a standard normal below z.
__device__ __forceinline__ double share_below(double z) { return 0.5 * erfc(-z * 0.70710678118654752440); }

// z times the density at z; 0 at the infinite ends.
__device__ __forceinline__ double below_slope(double z) {
    return fabs(z) == (double)INFINITY ? 0.0 : z * 0.3989422804014327 * exp(-0.5 * z * z);
}

// The divergence of two normals, from the difference of their means and the logarithms of their variances.
__device__ __forceinline__ Term divergence(double difference, double log_q, double log_p) {
    double share = exp(log_q - log_p) + difference * difference * exp(-log_p);
    return {0.5 * (log_p - log_q - 1.0 + share), 0.5 * (1.0 - share)};
}

// The negative logarithm of a level's probability; the darkest and the brightest have no outer end.
__device__ __forceinline__ Term decoder(double x, double mean, double log_variance) {
    const double half_level = 1.0 / 255.0, edge = 0.999, least = 1e-12;
    double inverse = exp(-0.5 * log_variance);
    double below = x < -edge ? -(double)INFINITY : (x - mean - half_level) * inverse;
    double above = x > edge ? (double)INFINITY : (x - mean + half_level) * inverse;
    // From the side on which both shares are small, so that their difference keeps its digits.
    double probability = below > 0.0 ? share_below(-below) - share_below(-above) : share_below(above) - share_below(below);
    if (probability <= least) return {-log(least), 0.0};
    return {-log(probability), -0.5 * (below_slope(below) - below_slope(above)) / probability};
}

// The term of number i, and its slope by v.
__device__ __forceinline__ Term bound_term(const float *output, const float *v, const float *x_0, const float *x_t, const float *t,
                                           const BoundStep *steps, int count, int image, int i) {
    BoundStep k = steps[min((int)t[i / image], count - 1)];
    double mean = k.from_x_t * (double)x_t[i] + k.from_output * (double)output[i];
    double part = ((double)v[i] + 1.0) / 2.0;
    double log_variance = part * k.high + (1.0 - part) * k.low;
    Term term = k.decoder != 0.0 ? decoder((double)x_0[i], mean, log_variance)
                                 : divergence(k.posterior_x_0 * ((double)x_0[i] - mean), k.low, log_variance);
    term.slope *= 0.5 * (k.high - k.low);
    return term;
}

// y = factor times the sum of the terms, in parts of `run` numbers.
extern "C" __global__ void bound(const float *output, const float *v, const float *x_0, const float *x_t, const float *t,
                                 const BoundStep *steps, const double *factor, float *y, double *parts, u32 *counter, int n,
                                 int image, int count, int run) {
    int last = min(n, (int)(blockIdx.x + 1) * run);
    double sum = 0.0;
    for (int i = blockIdx.x * run + threadIdx.x; i < last; i += blockDim.x)
        sum += bound_term(output, v, x_0, x_t, t, steps, count, image, i).value;
    if (sum_of_grid(sum, parts, counter) && threadIdx.x == 0) y[0] = (float)(factor[0] * sum);
}

extern "C" __global__ void bound_grad(const float *output, const float *v, const float *x_0, const float *x_t, const float *t,
                                      const float *dloss, const BoundStep *steps, const double *factor, float *dv, int n,
                                      int image, int count) {
    double share = factor[0] * (double)dloss[0];
    for (int i = thread_of_grid(); i < n; i += threads_of_grid())
        dv[i] = (float)(share * bound_term(output, v, x_0, x_t, t, steps, count, image, i).slope);
}
