// Operations number by number, and copies. `y` may be the same memory as the first operand.

template <class F> __device__ __forceinline__ void map1(const float *x, float *y, int n, F f) {
    int fours = n / 4;
    for (int i = thread_of_grid(); i < fours; i += threads_of_grid()) {
        float4 v = ((const float4 *)x)[i];
        ((float4 *)y)[i] = make_float4(f(v.x), f(v.y), f(v.z), f(v.w));
    }
    int i = 4 * fours + thread_of_grid();
    if (i < n) y[i] = f(x[i]);
}

template <class F> __device__ __forceinline__ void map2(const float *a, const float *b, float *y, int n, F f) {
    int fours = n / 4;
    for (int i = thread_of_grid(); i < fours; i += threads_of_grid()) {
        float4 v = ((const float4 *)a)[i], w = ((const float4 *)b)[i];
        ((float4 *)y)[i] = make_float4(f(v.x, w.x), f(v.y, w.y), f(v.z, w.z), f(v.w, w.w));
    }
    int i = 4 * fours + thread_of_grid();
    if (i < n) y[i] = f(a[i], b[i]);
}

extern "C" __global__ void add(const float *a, const float *b, float *y, int n) {
    map2(a, b, y, n, [](float a, float b) { return a + b; });
}

extern "C" __global__ void multiply(const float *a, const float *b, float *y, int n) {
    map2(a, b, y, n, [](float a, float b) { return a * b; });
}

extern "C" __global__ void affine(const float *x, float *y, int n, float scale, float shift) {
    map1(x, y, n, [=](float x) { return fmaf(scale, x, shift); });
}

// running = (1 - momentum) running + momentum value
extern "C" __global__ void running_average(const float *running, const float *value, float *y, int n, float momentum) {
    map2(running, value, y, n, [=](float a, float b) { return (1.0f - momentum) * a + momentum * b; });
}

extern "C" __global__ void fill(float *y, int n, float value) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) y[i] = value;
}

extern "C" __global__ void copy(const float *x, float *y, int n) {
    map1(x, y, n, [](float x) { return x; });
}

// y = x + r, or x (1 + r), for every pixel: x [n, pixels, c], r [n, c].
extern "C" __global__ void add_picture(const float *x, const float *r, float *y, int n, int picture, int c) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) y[i] = x[i] + r[i / picture * c + i % c];
}

extern "C" __global__ void scale_picture(const float *x, const float *r, float *y, int n, int picture, int c) {
    for (int i = thread_of_grid(); i < n; i += threads_of_grid()) y[i] = fmaf(x[i], r[i / picture * c + i % c], x[i]);
}

// ------------------------------------------------------------------------------------------- activation functions

extern "C" __global__ void silu_forward(const float *x, float *y, int n) {
    map1(x, y, n, [](float x) { return silu(x); });
}

extern "C" __global__ void relu_forward(const float *x, float *y, int n) {
    map1(x, y, n, [](float x) { return x < 0.0f ? 0.0f : x; });
}

extern "C" __global__ void gelu_forward(const float *x, float *y, int n) {
    map1(x, y, n, [](float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); });
}

extern "C" __global__ void mish_forward(const float *x, float *y, int n) {
    map1(x, y, n, [](float x) { return x * tanhf(log1pf(expf(x))); });
}

extern "C" __global__ void silu_backward(const float *dy, const float *x, float *y, int n) {
    map2(dy, x, y, n, [](float dy, float x) { return dy * silu_slope(x); });
}

extern "C" __global__ void relu_backward(const float *dy, const float *x, float *y, int n) {
    map2(dy, x, y, n, [](float dy, float x) { return x > 0.0f ? dy : 0.0f; });
}

extern "C" __global__ void gelu_backward(const float *dy, const float *x, float *y, int n) {
    map2(dy, x, y, n, [](float dy, float x) {
        float cdf = 0.5f * erfcf(-0.70710678118654752f * x);
        return dy * fmaf(x, 0.39894228040143268f * expf(-0.5f * x * x), cdf);
    });
}

extern "C" __global__ void mish_backward(const float *dy, const float *x, float *y, int n) {
    map2(dy, x, y, n, [](float dy, float x) {
        float w = tanhf(log1pf(expf(x)));
        return dy * fmaf(x, (1.0f - w * w) * sigmoid(x), w);
    });
}

// ---------------------------------------------------------------------------------------------------------- copies

// to[r, to_from + i] = from[r, from_from + i] for i below `columns`.
extern "C" __global__ void copy_columns(const float *from, float *to, int rows, int columns, int from_stride, int from_from,
                                        int to_stride, int to_from) {
    if (columns % 4 == 0 && from_stride % 4 == 0 && from_from % 4 == 0 && to_stride % 4 == 0 && to_from % 4 == 0) {
        int fours = columns / 4;
        for (int i = thread_of_grid(); i < rows * fours; i += threads_of_grid()) {
            int r = i / fours, c = i % fours * 4;
            *(float4 *)(to + r * to_stride + to_from + c) = *(const float4 *)(from + r * from_stride + from_from + c);
        }
        return;
    }
    for (int i = thread_of_grid(); i < rows * columns; i += threads_of_grid()) {
        int r = i / columns, c = i % columns;
        to[r * to_stride + to_from + c] = from[r * from_stride + from_from + c];
    }
}

// --------------------------------------------------------------------------------------------------------- dropout

// Masks as ddpm_kernels::random::Dropout: word j of counter 16 b + l belongs to number 64 b + 16 j + l of a picture.
// blockIdx.y is the picture.
extern "C" __global__ void dropout(const float *x, float *y, int picture, const Control *control, u32 purpose,
                                   u32 threshold, float scale) {
    u32 index = control->first_index + blockIdx.y;
    int counters = ceil_div(picture, 64) * 16, base = blockIdx.y * picture;
    for (int k = thread_of_grid(); k < counters; k += threads_of_grid()) {
        uint4 words = philox(k, index, control->step, purpose, control->seed[0], control->seed[1]);
        u32 of[4] = {words.x, words.y, words.z, words.w};
        for (int j = 0; j < 4; j++) {
            int i = k / 16 * 64 + 16 * j + k % 16;
            if (i < picture) y[base + i] = x[base + i] * keep(of[j], threshold, scale);
        }
    }
}
