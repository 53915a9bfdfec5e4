// Resizing of images.

// Linear resampling: output rows and columns are weighted sums of a few input ones. `starts` has each position's first tap.
template <int V>
__device__ __forceinline__ void resample_of(In x, Out y, int n, int h, int w, int oh, int ow, int c, const int *row_starts,
                                            const int *row_taps, const float *row_weights, const int *column_starts,
                                            const int *column_taps, const float *column_weights) {
    for (int i = grid_thread() * V; i < n * oh * ow * c; i += grid_size() * V) {
        int ch = i % c, ox = i / c % ow, oy = i / c / ow % oh, image = i / c / ow / oh;
        float sum[V];
        for (int j = 0; j < V; j++) sum[j] = 0.0f;
        for (int r = row_starts[oy]; r < row_starts[oy + 1]; r++)
            for (int k = column_starts[ox]; k < column_starts[ox + 1]; k++) {
                float v[V], weight = row_weights[r] * column_weights[k];
                x.get<V>(((image * h + row_taps[r]) * w + column_taps[k]) * c + ch, v);
#pragma unroll
                for (int j = 0; j < V; j++) sum[j] = fmaf(weight, v[j], sum[j]);
            }
        y.set<V>(i, sum);
    }
}

extern "C" __global__ void resample(In x, Out y, int n, int h, int w, int oh, int ow, int c, const int *row_starts,
                                    const int *row_taps, const float *row_weights, const int *column_starts,
                                    const int *column_taps, const float *column_weights) {
    if (c % 8 == 0)
        resample_of<8>(x, y, n, h, w, oh, ow, c, row_starts, row_taps, row_weights, column_starts, column_taps,
                       column_weights);
    else
        resample_of<1>(x, y, n, h, w, oh, ow, c, row_starts, row_taps, row_weights, column_starts, column_taps,
                       column_weights);
}

// The largest of four; NaN if any is NaN.
__device__ __forceinline__ float largest(const float (&v)[4]) {
    float maximum = v[0];
    for (int i = 1; i < 4; i++)
        if (maximum == maximum && !(v[i] <= maximum)) maximum = v[i];
    return maximum;
}

__device__ __forceinline__ void block_of(In x, int at, int w, int c, float (&v)[4]) {
    v[0] = x[at];
    v[1] = x[at + c];
    v[2] = x[at + w * c];
    v[3] = x[at + w * c + c];
}

extern "C" __global__ void max_pool(In x, Out y, int n, int h, int w, int c) {
    int oh = h / 2, ow = w / 2;
    for (int i = grid_thread(); i < n * oh * ow * c; i += grid_size()) {
        int ch = i % c, ox = i / c % ow, oy = i / c / ow % oh, image = i / c / ow / oh;
        float v[4];
        block_of(x, ((image * h + 2 * oy) * w + 2 * ox) * c + ch, w, c, v);
        y.set(i, largest(v));
    }
}

// The first maximum of each block gets all of dy; odd last rows and columns get nothing.
extern "C" __global__ void max_pool_grad(In dy, In x, Out dx, int n, int h, int w, int c) {
    int bh = ceil_div(h, 2), bw = ceil_div(w, 2), oh = h / 2, ow = w / 2;
    for (int i = grid_thread(); i < n * bh * bw * c; i += grid_size()) {
        int ch = i % c, bx = i / c % bw, by = i / c / bw % bh, image = i / c / bw / bh;
        int at = ((image * h + 2 * by) * w + 2 * bx) * c + ch;
        if (by < oh && bx < ow) {
            float v[4];
            block_of(x, at, w, c, v);
            float maximum = largest(v), left = dy[((image * oh + by) * ow + bx) * c + ch];
            for (int k = 0; k < 4; k++) {
                bool hit = v[k] == maximum;
                dx.set(at + (k / 2 * w + k % 2) * c, hit ? left : 0.0f);
                if (hit) left = 0.0f;
            }
        } else {
            for (int k = 0; k < 4; k++)
                if (2 * by + k / 2 < h && 2 * bx + k % 2 < w) dx.set(at + (k / 2 * w + k % 2) * c, 0.0f);
        }
    }
}
