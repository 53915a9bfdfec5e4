// The variational bound as the loss of a learned variance: ddpm_kernels::bound, elementwise in f64.

// Coefficients of a timestep's term: one row of the table.
struct BoundStep {
    double from_x_t, from_output, posterior_x_0, low, high, decoder;
};

// A term in nats, and its derivative with respect to the log variance.
struct Term {
    double value, grad;
};

// Standard normal CDF.
__device__ __forceinline__ double normal_cdf(double z) { return 0.5 * erfc(-z * 0.70710678118654752440); }

// z times the standard normal density; 0 at infinity.
__device__ __forceinline__ double z_density(double z) {
    return fabs(z) == (double)INFINITY ? 0.0 : z * 0.3989422804014327 * exp(-0.5 * z * z);
}

// KL divergence of two normal distributions, from the difference of their means and their log variances.
__device__ __forceinline__ Term divergence(double difference, double log_q, double log_p) {
    double share = exp(log_q - log_p) + difference * difference * exp(-log_p);
    return {0.5 * (log_p - log_q - 1.0 + share), 0.5 * (1.0 - share)};
}

// Negative log likelihood of a discretised level; the extreme levels extend to infinity.
__device__ __forceinline__ Term decoder(double x, double mean, double log_variance) {
    const double half_level = 1.0 / 255.0, edge = 0.999, min_probability = 1e-12;
    double inverse = exp(-0.5 * log_variance);
    double below = x < -edge ? -(double)INFINITY : (x - mean - half_level) * inverse;
    double above = x > edge ? (double)INFINITY : (x - mean + half_level) * inverse;
    // Use the tail in which both probabilities are small, so that their difference does not cancel.
    double probability = below > 0.0 ? normal_cdf(-below) - normal_cdf(-above) : normal_cdf(above) - normal_cdf(below);
    if (probability <= min_probability) return {-log(min_probability), 0.0};
    return {-log(probability), -0.5 * (z_density(below) - z_density(above)) / probability};
}

// The term of element i, and its derivative with respect to v.
__device__ __forceinline__ Term bound_term(const float *output, const float *v, const float *x_0, const float *x_t, const float *t,
                                           const BoundStep *steps, int count, int image, int i) {
    BoundStep k = steps[min((int)t[i / image], count - 1)];
    double mean = k.from_x_t * (double)x_t[i] + k.from_output * (double)output[i];
    double part = ((double)v[i] + 1.0) / 2.0;
    double log_variance = part * k.high + (1.0 - part) * k.low;
    Term term = k.decoder != 0.0 ? decoder((double)x_0[i], mean, log_variance)
                                 : divergence(k.posterior_x_0 * ((double)x_0[i] - mean), k.low, log_variance);
    term.grad *= 0.5 * (k.high - k.low);
    return term;
}

// y = factor times the sum of the terms, in partial sums of `run` elements.
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
    for (int i = grid_thread(); i < n; i += grid_size())
        dv[i] = (float)(share * bound_term(output, v, x_0, x_t, t, steps, count, image, i).grad);
}
