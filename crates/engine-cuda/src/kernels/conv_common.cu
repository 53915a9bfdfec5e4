// Shared by conv.cu and conv_bf16.cu: where pixels are read, and how results are stored.
#ifndef CONV_COMMON
#define CONV_COMMON

struct Tap {
    int dy, dx, k, unused;
};

// The output pixels of one phase, and the input they are computed from.
struct Pixels {
    int n, h, w, c;             // images; the input's height, width, channels
    int rows, columns;          // output pixels of a phase
    int stride_y, stride_x;     // steps through the input
};

// Stores results: to the output with addends, or, if k is split, to the partial sums of block z.
struct Epilogue {
    Out y;
    float *parts;
    const float *bias;
    In per_image_bias, residual;
    int m, n, rows, columns;            // of the product; pixels of a phase
    int out_h, out_w;                   // of the full output
    int first_y, first_x, step_y, step_x; // of the phase's pixels in it
    int flags;                          // 1: bias, 2: per-image bias, 4: residual

    // Output offset and image of row m.
    __device__ __forceinline__ void row(int at, int &offset, int &image) const {
        int j = at % columns, i = at / columns % rows;
        image = at / columns / rows;
        offset = ((image * out_h + first_y + i * step_y) * out_w + first_x + j * step_x) * n;
    }

    __device__ __forceinline__ float add_addends(float v, int offset, int image, int column) const {
        if (flags & 1) v += bias[column];
        if (flags & 2) v += per_image_bias[image * n + column];
        if (flags & 4) v += residual[offset + column];
        return v;
    }

    // Stores elements (row, column ..) of the product; the column is a multiple of COUNT.
    template <int COUNT> __device__ __forceinline__ void store(int at, int column, const float (&v)[COUNT]) const {
        if (at >= m || column >= n) return;
        bool aligned = n % COUNT == 0;
        if (gridDim.z > 1) {
            int from = (blockIdx.z * m + at) * n + column;
            if (aligned) return Out{(u64)parts}.set<COUNT>(from, v);
            for (int i = 0; i < COUNT; i++)
                if (column + i < n) parts[from + i] = v[i];
            return;
        }
        int offset, image;
        row(at, offset, image);
        if (aligned) {
            float sum[COUNT], addend[COUNT];
            for (int i = 0; i < COUNT; i++) sum[i] = v[i] + (flags & 1 ? bias[column + i] : 0.0f);
            if (flags & 2) {
                per_image_bias.get<COUNT>(image * n + column, addend);
                for (int i = 0; i < COUNT; i++) sum[i] += addend[i];
            }
            if (flags & 4) {
                residual.get<COUNT>(offset + column, addend);
                for (int i = 0; i < COUNT; i++) sum[i] += addend[i];
            }
            return y.set<COUNT>(offset + column, sum);
        }
        for (int i = 0; i < COUNT; i++)
            if (column + i < n) y.set(offset + column + i, add_addends(v[i], offset, image, column + i));
    }
};

// For a weight gradient [m, n].
__device__ __forceinline__ Epilogue weight_grad_epilogue(Out dw, float *parts, int m, int n) {
    return Epilogue{dw, parts, 0, In{0}, In{0}, m, n, m, 1, m, 1, 0, 0, 1, 1, 0};
}

// Kernel parameters for the gathered pixels and for the result.
#define PIXEL_PARAMS(X)                                                                                                        \
    X x, const Tap *taps, int n, int h, int w, int c, int rows, int columns, int stride_y, int stride_x, int tap_count
#define EPILOGUE_PARAMS                                                                                                           \
    Out y, float *parts, const float *bias, In per_image_bias, In residual, int channels, int out_h, int out_w, int first_y, \
        int first_x, int step_y, int step_x, int flags
#define MAKE_PIXELS                                                                                                        \
    Pixels { n, h, w, c, rows, columns, stride_y, stride_x }
#define MAKE_EPILOGUE(M)                                                                                                     \
    Epilogue {                                                                                                             \
        y, parts, bias, per_image_bias, residual, M, channels, rows, columns, out_h, out_w, first_y, first_x, step_y,      \
            step_x, flags                                                                                                \
    }
#endif
