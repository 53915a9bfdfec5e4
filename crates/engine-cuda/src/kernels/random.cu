// Random samples, the forward process, embeddings.

__device__ __forceinline__ double unit(u32 word) { return ((double)word + 0.5) * (1.0 / 4294967296.0); }

// Standard normal samples by Box-Muller in f64, as in ddpm_rng: elements 4 b .. 4 b + 4 of an image from one Philox block.
__device__ __forceinline__ void normals(uint4 words, float *out, int b, int image) {
    double r0 = sqrt(-2.0 * log(unit(words.x))), r1 = sqrt(-2.0 * log(unit(words.z)));
    double s0, c0, s1, c1;
    sincos(6.283185307179586 * unit(words.y), &s0, &c0);
    sincos(6.283185307179586 * unit(words.w), &s1, &c1);
    double z[4] = {r0 * c0, r0 * s0, r1 * c1, r1 * s1};
    for (int j = 0; j < 4; j++)
        if (4 * b + j < image) out[4 * b + j] = (float)z[j];
}

// blockIdx.y is the image.
extern "C" __global__ void random_normal(float *y, int image, const Control *control, u32 purpose) {
    u32 index = control->first_index + blockIdx.y;
    float *out = y + blockIdx.y * image;
    for (int b = grid_thread(); b < ceil_div(image, 4); b += grid_size()) {
        normals(philox(b, index, control->step, purpose, control->seed[0], control->seed[1]), out, b, image);
    }
}

// The same for a sampler's batch, with the key as arguments.
extern "C" __global__ void sampler_normal(float *y, int n, int image, u32 seed0, u32 seed1, u32 step, u32 first_index,
                                         u32 purpose) {
    int blocks = ceil_div(image, 4);
    for (int i = grid_thread(); i < n * blocks; i += grid_size()) {
        int p = i / blocks, b = i % blocks;
        normals(philox(b, first_index + p, step, purpose, seed0, seed1), y + (u64)p * image, b, image);
    }
}

extern "C" __global__ void random_timestep(float *t, int n, const Control *control, u32 purpose, u32 steps) {
    for (int i = grid_thread(); i < n; i += grid_size()) {
        u32 index = control->first_index + i;
        u32 word = philox(0, index, control->step, purpose, control->seed[0], control->seed[1]).x;
        t[i] = (float)(u32)(((u64)word * steps) >> 32);
    }
}

// y = a[t] x + b[t] eps, with t per image.
extern "C" __global__ void q_sample(const float *x, const float *eps, const float *t, float *y, int n, int image,
                                    const float *a, const float *b, int steps) {
    for (int i = grid_thread(); i < n; i += grid_size()) {
        int at = min((int)t[i / image], steps - 1);
        y[i] = fmaf(a[at], x[i], b[at] * eps[i]);
    }
}

// Sines and cosines of t f_i: y [n, 2 half].
extern "C" __global__ void sinusoidal_embedding(const float *t, float *y, int n, int half, const double *frequencies, int cosines_first) {
    for (int i = grid_thread(); i < n * half; i += grid_size()) {
        int row = i / half, j = i % half;
        double s, c;
        sincos((double)t[row] * frequencies[j], &s, &c);
        y[row * 2 * half + (cosines_first ? half : 0) + j] = (float)s;
        y[row * 2 * half + (cosines_first ? 0 : half) + j] = (float)c;
    }
}

// Row index of a label; -1 (an embedding of zeros) unless the label is a valid index.
__device__ __forceinline__ int row_of(float label, int rows) {
    return label >= 0.0f && label < (float)rows && truncf(label) == label ? (int)label : -1;
}

extern "C" __global__ void embedding(const float *table, const float *label, float *y, int n, int c, int rows) {
    for (int i = grid_thread(); i < n * c; i += grid_size()) {
        int row = row_of(label[i / c], rows);
        y[i] = row < 0 ? 0.0f : table[row * c + i % c];
    }
}

extern "C" __global__ void embedding_grad(const float *dy, const float *label, float *y, int n, int c, int rows) {
    for (int i = grid_thread(); i < rows * c; i += grid_size()) {
        float sum = 0.0f;
        for (int j = 0; j < n; j++)
            if (row_of(label[j], rows) == i / c) sum += dy[j * c + i % c];
        y[i] = sum;
    }
}
