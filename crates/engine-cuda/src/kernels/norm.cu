// Group, layer and batch normalisation, forward and backward.

// ------------------------------------------------------------------------------------------- group normalisation

// Offset in x of element (or vector) i of an image's group.
template <int V> __device__ __forceinline__ int group_offset(int i, int per_group, int c) {
    int of_pixel = per_group / V;
    return i / of_pixel * c + i % of_pixel * V;
}

// Adjacent groups of an image, so many that a block reads full memory sectors per pixel. Each of 512 threads handles V channels
// of one group; the numbers of threads per pixel, and per group within a pixel, are powers of two up to 32.
struct GroupBlock {
    int of_pixel, of_group; // threads
    int pixel, step;        // the thread's first pixel, and the stride to its next
    int ch, group;          // its first channel, and its group

    __device__ __forceinline__ GroupBlock(int v, int c, int groups, int at_once) {
        of_group = c / groups / v;
        of_pixel = of_group * at_once;
        int mine = threadIdx.x % of_pixel;
        pixel = threadIdx.x / of_pixel;
        step = 512 / of_pixel;
        ch = (blockIdx.x * of_pixel + mine) * v;
        group = blockIdx.x * at_once + mine / of_group;
    }

    // Sum over all threads of the group, returned to each of them; the order is fixed.
    __device__ __forceinline__ double sum(float v, float (*shared)[32]) const {
        for (int d = 16; d > 0; d >>= 1)
            if (d >= of_pixel || d < of_group) v += __shfl_xor_sync(0xffffffffu, v, d);
        int lane = threadIdx.x % 32;
        __syncthreads();
        if (lane < of_pixel) shared[threadIdx.x / 32][lane] = v;
        __syncthreads();
        double total = 0.0;
        for (int warp = 0; warp < 16; warp++) total += (double)shared[warp][threadIdx.x % of_pixel];
        return total;
    }
};

template <int V>
__device__ __forceinline__ void group_norm_groups_of(In x, const float *gamma, const float *beta, Out y, float *stats, int pixels,
                                                     int c, int groups, int at_once, float eps, int with_silu) {
    __shared__ float shared[16][32];
    GroupBlock b(V, c, groups, at_once);
    int image = blockIdx.y, from = image * pixels * c + b.ch;
    double count = (double)pixels * (c / groups);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int p = b.pixel; p < pixels; p += b.step) {
        float v[V];
        x.get<V>(from + p * c, v);
#pragma unroll
        for (int j = 0; j < V; j++) sum += v[j];
    }
    float mean = (float)(b.sum(sum, shared) / count);
#pragma unroll 4
    for (int p = b.pixel; p < pixels; p += b.step) {
        float v[V];
        x.get<V>(from + p * c, v);
#pragma unroll
        for (int j = 0; j < V; j++) squares = fmaf(v[j] - mean, v[j] - mean, squares);
    }
    float rstd = (float)(1.0 / sqrt(b.sum(squares, shared) / count + (double)eps));
    if (threadIdx.x < b.of_pixel && threadIdx.x % b.of_group == 0) {
        stats[image * 2 * groups + b.group] = mean;
        stats[image * 2 * groups + groups + b.group] = rstd;
    }
    float scale[V], shift[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
        scale[j] = gamma[b.ch + j];
        shift[j] = beta[b.ch + j];
    }
#pragma unroll 4
    for (int p = b.pixel; p < pixels; p += b.step) {
        float v[V];
        x.get<V>(from + p * c, v);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float z = fmaf((v[j] - mean) * rstd, scale[j], shift[j]);
            v[j] = with_silu ? silu(z) : z;
        }
        y.set<V>(from + p * c, v);
    }
}

// Blocks (x: `at_once` groups, y: image).
extern "C" __global__ void __launch_bounds__(512)
    group_norm_groups(In x, const float *gamma, const float *beta, Out y, float *stats, int pixels, int c, int groups,
                      int at_once, float eps, int with_silu) {
    int per_group = c / groups;
    if (per_group % 8 == 0)
        group_norm_groups_of<8>(x, gamma, beta, y, stats, pixels, c, groups, at_once, eps, with_silu);
    else if (per_group % 4 == 0)
        group_norm_groups_of<4>(x, gamma, beta, y, stats, pixels, c, groups, at_once, eps, with_silu);
    else
        group_norm_groups_of<1>(x, gamma, beta, y, stats, pixels, c, groups, at_once, eps, with_silu);
}

// For other groups (large or oddly sized), in runs of pixels: blocks (x: run, y: group, z: image).
//
// First the mean and the sum of squared deviations of each run, parts [image, group, run, 2].
template <int V>
__device__ __forceinline__ void group_norm_parts_of(In x, float *parts, int pixels, int c, int groups, int run) {
    __shared__ float shared[32];
    int per_group = c / groups, first = blockIdx.x * run, count = min(run, pixels - first) * per_group;
    int from = (blockIdx.z * pixels + first) * c + blockIdx.y * per_group;
    float sum = 0.0f, squares = 0.0f, v[V];
    for (int i = threadIdx.x; i < count / V; i += blockDim.x) {
        x.get<V>(from + group_offset<V>(i, per_group, c), v);
#pragma unroll
        for (int j = 0; j < V; j++) sum += v[j];
    }
    float mean = block_sum(sum, shared) / count;
    for (int i = threadIdx.x; i < count / V; i += blockDim.x) {
        x.get<V>(from + group_offset<V>(i, per_group, c), v);
#pragma unroll
        for (int j = 0; j < V; j++) squares = fmaf(v[j] - mean, v[j] - mean, squares);
    }
    squares = block_sum(squares, shared);
    float *to = parts + ((blockIdx.z * groups + blockIdx.y) * gridDim.x + blockIdx.x) * 2;
    if (threadIdx.x == 0) {
        to[0] = mean;
        to[1] = squares;
    }
}

extern "C" __global__ void group_norm_parts(In x, float *parts, int pixels, int c, int groups, int run) {
    int per_group = c / groups;
    if (per_group % 8 == 0)
        group_norm_parts_of<8>(x, parts, pixels, c, groups, run);
    else if (per_group % 4 == 0)
        group_norm_parts_of<4>(x, parts, pixels, c, groups, run);
    else
        group_norm_parts_of<1>(x, parts, pixels, c, groups, run);
}

// Then the normalisation; runs are combined as in Chan, Golub, LeVeque 1979.
template <int V>
__device__ __forceinline__ void group_norm_apply_of(In x, const float *gamma, const float *beta, const float *parts, Out y,
                                                    float *stats, int pixels, int c, int groups, int run, float eps,
                                                    int with_silu) {
    __shared__ double shared[32];
    int group = blockIdx.y, image = blockIdx.z, per_group = c / groups, runs = gridDim.x;
    const float *of_group = parts + (image * groups + group) * runs * 2;
    double all = (double)pixels * per_group, sum = 0.0, squares = 0.0;
    for (int r = threadIdx.x; r < runs; r += blockDim.x)
        sum += (double)of_group[2 * r] * (min(run, pixels - r * run) * per_group);
    double centre = block_sum(sum, shared) / all;
    for (int r = threadIdx.x; r < runs; r += blockDim.x) {
        double off = (double)of_group[2 * r] - centre;
        squares += (double)of_group[2 * r + 1] + off * off * (min(run, pixels - r * run) * per_group);
    }
    float mean = (float)centre, rstd = (float)(1.0 / sqrt(block_sum(squares, shared) / all + (double)eps));
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        stats[image * 2 * groups + group] = mean;
        stats[image * 2 * groups + groups + group] = rstd;
    }
    int first = blockIdx.x * run, count = min(run, pixels - first) * per_group;
    int from = (image * pixels + first) * c + group * per_group;
    for (int i = threadIdx.x; i < count / V; i += blockDim.x) {
        int at = group_offset<V>(i, per_group, c), ch = group * per_group + i % (per_group / V) * V;
        float v[V];
        x.get<V>(from + at, v);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float z = fmaf((v[j] - mean) * rstd, gamma[ch + j], beta[ch + j]);
            v[j] = with_silu ? silu(z) : z;
        }
        y.set<V>(from + at, v);
    }
}

extern "C" __global__ void group_norm_apply(In x, const float *gamma, const float *beta, const float *parts, Out y, float *stats,
                                            int pixels, int c, int groups, int run, float eps, int with_silu) {
    int per_group = c / groups;
    if (per_group % 8 == 0)
        group_norm_apply_of<8>(x, gamma, beta, parts, y, stats, pixels, c, groups, run, eps, with_silu);
    else if (per_group % 4 == 0)
        group_norm_apply_of<4>(x, gamma, beta, parts, y, stats, pixels, c, groups, run, eps, with_silu);
    else
        group_norm_apply_of<1>(x, gamma, beta, parts, y, stats, pixels, c, groups, run, eps, with_silu);
}

// x_hat, and the gradient before the activation function.
__device__ __forceinline__ void before_activation(float x, float dy, float mean, float rstd, float gamma, float beta,
                                                  int with_silu, float &x_hat, float &dz) {
    x_hat = (x - mean) * rstd;
    dz = with_silu ? dy * silu_grad(fmaf(x_hat, gamma, beta)) : dy;
}

// The gradient for the same groups in one pass: per-image sums shares [image, 2, c] of dbeta and dgamma, and dx.
template <int V>
__device__ __forceinline__ void group_norm_grad_groups_of(In x, In dy, const float *gamma, const float *beta, const float *stats,
                                                          float *shares, Out dx, int pixels, int c, int groups, int at_once,
                                                          int with_silu, float (*of_warps)[2][256],
                                                          double (*of_channels)[256]) {
    GroupBlock b(V, c, groups, at_once);
    int image = blockIdx.y, from = image * pixels * c + b.ch, per_group = c / groups, channels = per_group * at_once;
    float mean = stats[image * 2 * groups + b.group], rstd = stats[image * 2 * groups + groups + b.group];
    float sum[V], product[V], scale[V], shift[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
        sum[j] = product[j] = 0.0f;
        scale[j] = gamma[b.ch + j];
        shift[j] = beta[b.ch + j];
    }
#pragma unroll 2
    for (int p = b.pixel; p < pixels; p += b.step) {
        float v[V], g[V];
        x.get<V>(from + p * c, v);
        dy.get<V>(from + p * c, g);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float x_hat, dz;
            before_activation(v[j], g[j], mean, rstd, scale[j], shift[j], with_silu, x_hat, dz);
            sum[j] += dz;
            product[j] = fmaf(dz, x_hat, product[j]);
        }
    }
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < V; j++) {
        for (int d = 16; d >= b.of_pixel; d >>= 1) {
            sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], d);
            product[j] += __shfl_xor_sync(0xffffffffu, product[j], d);
        }
        if (lane < b.of_pixel) {
            of_warps[threadIdx.x / 32][0][lane * V + j] = sum[j];
            of_warps[threadIdx.x / 32][1][lane * V + j] = product[j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * channels; i += 512) {
        int which = i / channels, ch = i % channels, at = blockIdx.x * channels + ch;
        double total = 0.0;
        for (int warp = 0; warp < 16; warp++) total += (double)of_warps[warp][which][ch];
        shares[(image * 2 + which) * c + at] = (float)total;
        of_channels[which][ch] = total * (double)gamma[at];
    }
    __syncthreads();
    double first = 0.0, second = 0.0;
    int begin = threadIdx.x % b.of_pixel / b.of_group * per_group;
    for (int i = begin; i < begin + per_group; i++) {
        first += of_channels[0][i];
        second += of_channels[1][i];
    }
    double count = (double)pixels * per_group;
    float mean_dz = (float)(first / count), mean_product = (float)(second / count);
#pragma unroll 2
    for (int p = b.pixel; p < pixels; p += b.step) {
        float v[V], g[V];
        x.get<V>(from + p * c, v);
        dy.get<V>(from + p * c, g);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float x_hat, dz;
            before_activation(v[j], g[j], mean, rstd, scale[j], shift[j], with_silu, x_hat, dz);
            g[j] = rstd * (dz * scale[j] - mean_dz - x_hat * mean_product);
        }
        dx.set<V>(from + p * c, g);
    }
}

extern "C" __global__ void __launch_bounds__(512)
    group_norm_grad_groups(In x, In dy, const float *gamma, const float *beta, const float *stats, float *shares, Out dx,
                           int pixels, int c, int groups, int at_once, int with_silu) {
    // At most 32 threads with eight channels each. Declared here, as each of the three instantiations would have its own copy.
    __shared__ float of_warps[16][2][256];
    __shared__ double of_channels[2][256];
    int per_group = c / groups;
    if (per_group % 8 == 0)
        group_norm_grad_groups_of<8>(x, dy, gamma, beta, stats, shares, dx, pixels, c, groups, at_once, with_silu,
                                     of_warps, of_channels);
    else if (per_group % 4 == 0)
        group_norm_grad_groups_of<4>(x, dy, gamma, beta, stats, shares, dx, pixels, c, groups, at_once, with_silu,
                                     of_warps, of_channels);
    else
        group_norm_grad_groups_of<1>(x, dy, gamma, beta, stats, shares, dx, pixels, c, groups, at_once, with_silu,
                                     of_warps, of_channels);
}

// For other groups, in three steps.
template <int V>
__device__ __forceinline__ void group_norm_grad_parts_of(In x, In dy, const float *gamma, const float *beta, const float *stats,
                                                         float *parts, int pixels, int c, int groups, int run, int with_silu) {
    __shared__ float shared[8][32];
    int ch = (blockIdx.x * 32 + threadIdx.x) * V, image = blockIdx.z;
    int last = min(pixels, (int)(blockIdx.y + 1) * run);
    float sum[V], product[V];
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = product[j] = 0.0f;
    if (ch < c) {
        int group = ch / (c / groups);
        float mean = stats[image * 2 * groups + group], rstd = stats[image * 2 * groups + groups + group];
#pragma unroll 4
        for (int p = blockIdx.y * run + threadIdx.y; p < last; p += 8) {
            int at = (image * pixels + p) * c + ch;
            float v[V], g[V];
            x.get<V>(at, v);
            dy.get<V>(at, g);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float x_hat, dz;
                before_activation(v[j], g[j], mean, rstd, gamma[ch + j], beta[ch + j], with_silu, x_hat, dz);
                sum[j] += dz;
                product[j] = fmaf(dz, x_hat, product[j]);
            }
        }
    }
    float *out = parts + (image * gridDim.y + blockIdx.y) * 2 * c + ch;
    for (int j = 0; j < V; j++) {
        float of_dz = sum_of_rows<8>(sum[j], shared), of_product = sum_of_rows<8>(product[j], shared);
        if (threadIdx.y == 0 && ch < c) {
            out[j] = of_dz;
            out[c + j] = of_product;
        }
    }
}

// Sums of dz and of dz x_hat per image (z), run of pixels (y) and channel, parts [image, run, 2, c]. Blocks of 32 threads by
// 8 pixels; a thread handles four channels of one group where group sizes allow.
extern "C" __global__ void group_norm_grad_parts(In x, In dy, const float *gamma, const float *beta, const float *stats,
                                                 float *parts, int pixels, int c, int groups, int run, int with_silu) {
    if (c / groups % 4 == 0)
        group_norm_grad_parts_of<4>(x, dy, gamma, beta, stats, parts, pixels, c, groups, run, with_silu);
    else
        group_norm_grad_parts_of<1>(x, dy, gamma, beta, stats, parts, pixels, c, groups, run, with_silu);
}

// Sums the runs of each image (y), shares [image, 2, c], and computes the means over each group (x) of dz gamma and
// dz gamma x_hat, means [image, groups, 2].
extern "C" __global__ void group_norm_grad_means(const float *parts, const float *gamma, float *shares, float *means,
                                                 int pixels, int c, int groups, int runs) {
    __shared__ double shared[32];
    int group = blockIdx.x, image = blockIdx.y, per_group = c / groups;
    double first = 0.0, second = 0.0;
    for (int i = threadIdx.x; i < per_group; i += blockDim.x) {
        int ch = group * per_group + i;
        double sum = 0.0, product = 0.0;
        for (int r = 0; r < runs; r++) {
            const float *part = parts + (image * runs + r) * 2 * c;
            sum += (double)part[ch];
            product += (double)part[c + ch];
        }
        shares[image * 2 * c + ch] = (float)sum;
        shares[image * 2 * c + c + ch] = (float)product;
        first += sum * (double)gamma[ch];
        second += product * (double)gamma[ch];
    }
    first = block_sum(first, shared);
    second = block_sum(second, shared);
    if (threadIdx.x == 0) {
        double count = (double)pixels * per_group;
        means[(image * groups + group) * 2] = (float)(first / count);
        means[(image * groups + group) * 2 + 1] = (float)(second / count);
    }
}

template <int V>
__device__ __forceinline__ void group_norm_grad_of(In x, In dy, const float *gamma, const float *beta, const float *stats,
                                                   const float *means, Out dx, int n, int pixels, int c, int groups,
                                                   int with_silu) {
    for (int i = grid_thread() * V; i < n * pixels * c; i += grid_size() * V) {
        int first = i % c, image = i / (pixels * c), group = first / (c / groups);
        float mean = stats[image * 2 * groups + group], rstd = stats[image * 2 * groups + groups + group];
        const float *of_group = means + (image * groups + group) * 2;
        float mean_dz = of_group[0], mean_product = of_group[1], v[V], g[V];
        x.get<V>(i, v);
        dy.get<V>(i, g);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float x_hat, dz, scale = gamma[first + j];
            before_activation(v[j], g[j], mean, rstd, scale, beta[first + j], with_silu, x_hat, dz);
            g[j] = rstd * (dz * scale - mean_dz - x_hat * mean_product);
        }
        dx.set<V>(i, g);
    }
}

// dx = rstd (dz gamma - mean(dz gamma) - x_hat mean(dz gamma x_hat)).
extern "C" __global__ void group_norm_grad(In x, In dy, const float *gamma, const float *beta, const float *stats,
                                           const float *means, Out dx, int n, int pixels, int c, int groups,
                                           int with_silu) {
    int per_group = c / groups;
    if (per_group % 8 == 0)
        group_norm_grad_of<8>(x, dy, gamma, beta, stats, means, dx, n, pixels, c, groups, with_silu);
    else if (per_group % 4 == 0)
        group_norm_grad_of<4>(x, dy, gamma, beta, stats, means, dx, n, pixels, c, groups, with_silu);
    else
        group_norm_grad_of<1>(x, dy, gamma, beta, stats, means, dx, n, pixels, c, groups, with_silu);
}

// ------------------------------------------------------------------------------------------- layer normalisation

// One warp per row; blocks of 32 by 8.
extern "C" __global__ void layer_norm(In x, const float *gamma, const float *beta, Out y, float *stats, int rows, int c,
                                      float eps) {
    int row = blockIdx.x * 8 + threadIdx.y, lane = threadIdx.x, from = row * c;
    if (row >= rows) return;
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < c; i += 32) sum += x[from + i];
    float mean = warp_sum(sum) / c;
    for (int i = lane; i < c; i += 32) {
        float d = x[from + i] - mean;
        squares = fmaf(d, d, squares);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / c + eps);
    for (int i = lane; i < c; i += 32) y.set(from + i, fmaf((x[from + i] - mean) * rstd, gamma[i], beta[i]));
    if (lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
}

// dx = rstd (g - mean(g) - x_hat mean(g x_hat)), g = dy gamma.
extern "C" __global__ void layer_norm_grad(In dy, In x, const float *gamma, const float *stats, Out dx, int rows, int c) {
    int row = blockIdx.x * 8 + threadIdx.y, lane = threadIdx.x, from = row * c;
    if (row >= rows) return;
    float mean = stats[2 * row], rstd = stats[2 * row + 1], first = 0.0f, second = 0.0f;
    for (int i = lane; i < c; i += 32) {
        float g = dy[from + i] * gamma[i];
        first += g;
        second = fmaf(g, (x[from + i] - mean) * rstd, second);
    }
    first = warp_sum(first) / c;
    second = warp_sum(second) / c;
    for (int i = lane; i < c; i += 32)
        dx.set(from + i, rstd * (dy[from + i] * gamma[i] - first - (x[from + i] - mean) * rstd * second));
}

template <int V>
__device__ __forceinline__ void layer_norm_grad_sums_of(In dy, In x, const float *stats, float *dgamma, float *dbeta,
                                                        float *parts, u32 *counters, int rows, int c, int run) {
    sum_columns<V, 2>(
        rows, c, run, parts, counters + blockIdx.x,
        [=](int r, int ch, float (&sums)[2][V]) {
            float v[V], g[V], mean = stats[2 * r], rstd = stats[2 * r + 1];
            x.get<V>(r * c + ch, v);
            dy.get<V>(r * c + ch, g);
#pragma unroll
            for (int j = 0; j < V; j++) {
                sums[0][j] = fmaf(g[j], (v[j] - mean) * rstd, sums[0][j]);
                sums[1][j] += g[j];
            }
        },
        [=](int ch, const double (&sums)[2]) {
            dgamma[ch] = (float)sums[0];
            dbeta[ch] = (float)sums[1];
        });
}

// dgamma = sum of dy x_hat and dbeta = sum of dy over the rows.
extern "C" __global__ void layer_norm_grad_sums(In dy, In x, const float *stats, float *dgamma, float *dbeta, float *parts,
                                                u32 *counters, int rows, int c, int run) {
    if (c % 4 == 0)
        layer_norm_grad_sums_of<4>(dy, x, stats, dgamma, dbeta, parts, counters, rows, c, run);
    else
        layer_norm_grad_sums_of<1>(dy, x, stats, dgamma, dbeta, parts, counters, rows, c, run);
}

// ------------------------------------------------------------------------------------------- batch normalisation

template <int V>
__device__ __forceinline__ void batch_norm_mean_of(In x, float *mean, float *parts, u32 *counters, int rows, int c, int run) {
    sum_columns<V, 1>(
        rows, c, run, parts, counters + blockIdx.x,
        [=](int r, int ch, float (&sums)[1][V]) {
            float v[V];
            x.get<V>(r * c + ch, v);
#pragma unroll
            for (int j = 0; j < V; j++) sums[0][j] += v[j];
        },
        [=](int ch, const double (&sums)[1]) { mean[ch] = (float)(sums[0] / rows); });
}

extern "C" __global__ void batch_norm_mean(In x, float *mean, float *parts, u32 *counters, int rows, int c, int run) {
    if (c % 4 == 0)
        batch_norm_mean_of<4>(x, mean, parts, counters, rows, c, run);
    else
        batch_norm_mean_of<1>(x, mean, parts, counters, rows, c, run);
}

template <int V>
__device__ __forceinline__ void batch_norm_variance_of(In x, const float *mean, const float *gamma, float *rstd, float *unbiased,
                                                       float *scale, float *parts, u32 *counters, int rows, int c, int run,
                                                       float eps) {
    sum_columns<V, 1>(
        rows, c, run, parts, counters + blockIdx.x,
        [=](int r, int ch, float (&sums)[1][V]) {
            float v[V];
            x.get<V>(r * c + ch, v);
#pragma unroll
            for (int j = 0; j < V; j++) {
                float d = v[j] - mean[ch + j];
                sums[0][j] = fmaf(d, d, sums[0][j]);
            }
        },
        [=](int ch, const double (&sums)[1]) {
            double r = 1.0 / sqrt(sums[0] / rows + (double)eps);
            rstd[ch] = (float)r;
            unbiased[ch] = (float)(sums[0] / (rows - 1));
            scale[ch] = (float)(r * (double)gamma[ch]);
        });
}

// After the mean: 1 / sqrt(variance + eps), the unbiased variance, and the factor of x - mean.
extern "C" __global__ void batch_norm_variance(In x, const float *mean, const float *gamma, float *rstd, float *unbiased,
                                               float *scale, float *parts, u32 *counters, int rows, int c, int run, float eps) {
    if (c % 4 == 0)
        batch_norm_variance_of<4>(x, mean, gamma, rstd, unbiased, scale, parts, counters, rows, c, run, eps);
    else
        batch_norm_variance_of<1>(x, mean, gamma, rstd, unbiased, scale, parts, counters, rows, c, run, eps);
}

extern "C" __global__ void batch_norm_inference_scale(const float *gamma, const float *variance, float *scale, int c, float eps) {
    for (int ch = grid_thread(); ch < c; ch += grid_size())
        scale[ch] = (float)((double)gamma[ch] / sqrt((double)variance[ch] + (double)eps));
}

template <int V>
__device__ __forceinline__ void normalise_of(In x, const float *mean, const float *scale, const float *shift, Out y, int n,
                                             int c) {
    for (int i = grid_thread() * V; i < n; i += grid_size() * V) {
        int ch = i % c;
        float v[V];
        x.get<V>(i, v);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = fmaf(v[j] - mean[ch + j], scale[ch + j], shift[ch + j]);
        y.set<V>(i, v);
    }
}

// y = (x - mean) scale + shift, per channel.
extern "C" __global__ void normalise(In x, const float *mean, const float *scale, const float *shift, Out y, int n, int c) {
    if (c % 8 == 0)
        normalise_of<8>(x, mean, scale, shift, y, n, c);
    else
        normalise_of<1>(x, mean, scale, shift, y, n, c);
}

template <int V>
__device__ __forceinline__ void batch_norm_grad_sums_of(In dy, In x, const float *gamma, const float *mean, const float *rstd,
                                                        float *dgamma, float *dbeta, float *terms, float *parts, u32 *counters,
                                                        int rows, int c, int run) {
    sum_columns<V, 2>(
        rows, c, run, parts, counters + blockIdx.x,
        [=](int r, int ch, float (&sums)[2][V]) {
            float v[V], g[V];
            x.get<V>(r * c + ch, v);
            dy.get<V>(r * c + ch, g);
#pragma unroll
            for (int j = 0; j < V; j++) {
                sums[0][j] += g[j];
                sums[1][j] = fmaf(g[j], v[j] - mean[ch + j], sums[1][j]);
            }
        },
        [=](int ch, const double (&sums)[2]) {
            double r = rstd[ch], all = (double)gamma[ch] * r;
            dbeta[ch] = (float)sums[0];
            dgamma[ch] = (float)(sums[1] * r);
            terms[ch] = (float)all;
            terms[c + ch] = (float)(-all * r * r * sums[1] / rows);
            terms[2 * c + ch] = (float)(-all * sums[0] / rows);
        });
}

// From the sums of dy and of dy (x - mean): dgamma, dbeta, and the coefficients of dx = scale dy + slope (x - mean) + offset,
// terms [3, c].
extern "C" __global__ void batch_norm_grad_sums(In dy, In x, const float *gamma, const float *mean, const float *rstd,
                                                float *dgamma, float *dbeta, float *terms, float *parts, u32 *counters, int rows,
                                                int c, int run) {
    if (c % 4 == 0)
        batch_norm_grad_sums_of<4>(dy, x, gamma, mean, rstd, dgamma, dbeta, terms, parts, counters, rows, c, run);
    else
        batch_norm_grad_sums_of<1>(dy, x, gamma, mean, rstd, dgamma, dbeta, terms, parts, counters, rows, c, run);
}

template <int V>
__device__ __forceinline__ void batch_norm_grad_of(In dy, In x, const float *mean, const float *terms, Out dx, int n, int c) {
    for (int i = grid_thread() * V; i < n; i += grid_size() * V) {
        int ch = i % c;
        float v[V], g[V];
        x.get<V>(i, v);
        dy.get<V>(i, g);
#pragma unroll
        for (int j = 0; j < V; j++) {
            float d = v[j] - mean[ch + j];
            g[j] = fmaf(terms[ch + j], g[j], fmaf(terms[c + ch + j], d, terms[2 * c + ch + j]));
        }
        dx.set<V>(i, g);
    }
}

extern "C" __global__ void batch_norm_grad(In dy, In x, const float *mean, const float *terms, Out dx, int n, int c) {
    if (c % 8 == 0)
        batch_norm_grad_of<8>(dy, x, mean, terms, dx, n, c);
    else
        batch_norm_grad_of<1>(dy, x, mean, terms, dx, n, c);
}
