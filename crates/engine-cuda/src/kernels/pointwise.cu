// Pointwise operations and copies. `y` may alias the first operand.

template <class F> __device__ __forceinline__ void map1(In x, Out y, int n, F f) {
    int eights = n / 8;
    for (int i = grid_thread(); i < eights; i += grid_size()) {
        float v[8];
        x.get<8>(8 * i, v);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = f(v[j]);
        y.set<8>(8 * i, v);
    }
    int i = 8 * eights + grid_thread();
    if (i < n) y.set(i, f(x[i]));
}

template <class F> __device__ __forceinline__ void map2(In a, In b, Out y, int n, F f) {
    int eights = n / 8;
    for (int i = grid_thread(); i < eights; i += grid_size()) {
        float v[8], w[8];
        a.get<8>(8 * i, v);
        b.get<8>(8 * i, w);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = f(v[j], w[j]);
        y.set<8>(8 * i, v);
    }
    int i = 8 * eights + grid_thread();
    if (i < n) y.set(i, f(a[i], b[i]));
}

extern "C" __global__ void add(In a, In b, Out y, int n) {
    map2(a, b, y, n, [](float a, float b) { return a + b; });
}

extern "C" __global__ void multiply(In a, In b, Out y, int n) {
    map2(a, b, y, n, [](float a, float b) { return a * b; });
}

extern "C" __global__ void affine(In x, Out y, int n, float scale, float shift) {
    map1(x, y, n, [=](float x) { return fmaf(scale, x, shift); });
}

// running = (1 - momentum) running + momentum value
extern "C" __global__ void running_average(In running, In value, Out y, int n, float momentum) {
    map2(running, value, y, n, [=](float a, float b) { return (1.0f - momentum) * a + momentum * b; });
}

extern "C" __global__ void fill(float *y, int n, float value) {
    for (int i = grid_thread(); i < n; i += grid_size()) y[i] = value;
}

extern "C" __global__ void copy(In x, Out y, int n) {
    map1(x, y, n, [](float x) { return x; });
}

// Applies r [n, c] to every pixel of x [n, pixels, c].
template <int V, class F>
__device__ __forceinline__ void per_image_of(In x, In r, Out y, int n, int image, int c, F f) {
    for (int i = grid_thread() * V; i < n; i += grid_size() * V) {
        float v[V], w[V];
        x.get<V>(i, v);
        r.get<V>(i / image * c + i % c, w);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = f(v[j], w[j]);
        y.set<V>(i, v);
    }
}

template <class F> __device__ __forceinline__ void per_image(In x, In r, Out y, int n, int image, int c, F f) {
    if (c % 8 == 0)
        per_image_of<8>(x, r, y, n, image, c, f);
    else
        per_image_of<1>(x, r, y, n, image, c, f);
}

// y = x + r
extern "C" __global__ void add_per_channel(In x, In r, Out y, int n, int image, int c) {
    per_image(x, r, y, n, image, c, [](float x, float r) { return x + r; });
}

// y = x (1 + r)
extern "C" __global__ void modulate(In x, In r, Out y, int n, int image, int c) {
    per_image(x, r, y, n, image, c, [](float x, float r) { return fmaf(x, r, x); });
}

// ------------------------------------------------------------------------------------------- activation functions

extern "C" __global__ void silu_forward(In x, Out y, int n) {
    map1(x, y, n, [](float x) { return silu(x); });
}

extern "C" __global__ void relu_forward(In x, Out y, int n) {
    map1(x, y, n, [](float x) { return x < 0.0f ? 0.0f : x; });
}

extern "C" __global__ void gelu_forward(In x, Out y, int n) {
    map1(x, y, n, [](float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); });
}

extern "C" __global__ void mish_forward(In x, Out y, int n) {
    map1(x, y, n, [](float x) { return x * tanhf(log1pf(expf(x))); });
}

extern "C" __global__ void silu_backward(In dy, In x, Out y, int n) {
    map2(dy, x, y, n, [](float dy, float x) { return dy * silu_grad(x); });
}

extern "C" __global__ void relu_backward(In dy, In x, Out y, int n) {
    map2(dy, x, y, n, [](float dy, float x) { return x > 0.0f ? dy : 0.0f; });
}

extern "C" __global__ void gelu_backward(In dy, In x, Out y, int n) {
    map2(dy, x, y, n, [](float dy, float x) {
        float cdf = 0.5f * erfcf(-0.70710678118654752f * x);
        return dy * fmaf(x, 0.39894228040143268f * expf(-0.5f * x * x), cdf);
    });
}

extern "C" __global__ void mish_backward(In dy, In x, Out y, int n) {
    map2(dy, x, y, n, [](float dy, float x) {
        float w = tanhf(log1pf(expf(x)));
        return dy * fmaf(x, (1.0f - w * w) * sigmoid(x), w);
    });
}

// ---------------------------------------------------------------------------------------------------------- copies

// y[r] = a[r] b[r] concatenated, rows of `of_a` and `of_b` elements.
template <int V> __device__ __forceinline__ void concat_of(In a, In b, Out y, int rows, int of_a, int of_b) {
    int columns = of_a + of_b, groups = columns / V;
    for (int i = grid_thread(); i < rows * groups; i += grid_size()) {
        int r = i / groups, c = i % groups * V;
        float v[V];
        if (c < of_a)
            a.get<V>(r * of_a + c, v);
        else
            b.get<V>(r * of_b + c - of_a, v);
        y.set<V>(r * columns + c, v);
    }
}

extern "C" __global__ void concat(In a, In b, Out y, int rows, int of_a, int of_b) {
    if ((of_a | of_b) % 8 == 0)
        concat_of<8>(a, b, y, rows, of_a, of_b);
    else
        concat_of<1>(a, b, y, rows, of_a, of_b);
}

// y[r] = `columns` elements of x[r] from `first` on; rows of `of_x` elements.
template <int V> __device__ __forceinline__ void slice_of(In x, Out y, int rows, int of_x, int first, int columns) {
    int groups = columns / V;
    for (int i = grid_thread(); i < rows * groups; i += grid_size()) {
        int r = i / groups, c = i % groups * V;
        float v[V];
        x.get<V>(r * of_x + first + c, v);
        y.set<V>(r * columns + c, v);
    }
}

extern "C" __global__ void slice(In x, Out y, int rows, int of_x, int first, int columns) {
    if ((of_x | first | columns) % 8 == 0)
        slice_of<8>(x, y, rows, of_x, first, columns);
    else
        slice_of<1>(x, y, rows, of_x, first, columns);
}

// --------------------------------------------------------------------------------------------------------- dropout

// Masks as in ddpm_kernels::random::Dropout: word j of counter 16 b + l is for element 64 b + 16 j + l of an image.
// blockIdx.y is the image.
extern "C" __global__ void dropout(In x, Out y, int image, const Control *control, u32 purpose,
                                   u32 threshold, float scale) {
    u32 index = control->first_index + blockIdx.y;
    int counters = ceil_div(image, 64) * 16, base = blockIdx.y * image;
    for (int k = grid_thread(); k < counters; k += grid_size()) {
        uint4 words = philox(k, index, control->step, purpose, control->seed[0], control->seed[1]);
        u32 of[4] = {words.x, words.y, words.z, words.w};
        for (int j = 0; j < 4; j++) {
            int i = k / 16 * 64 + 16 * j + k % 16;
            if (i < image) y.set(base + i, x[base + i] * drop_or_scale(of[j], threshold, scale));
        }
    }
}
