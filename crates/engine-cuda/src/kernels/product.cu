// What the products of conv.cu and conv_half.cu share: where pixels come from, and where sums go.
#ifndef PRODUCT
#define PRODUCT

struct Tap {
    int dy, dx, k, unused;
};

// The output pixels of one phase, and the input they are made of.
struct Pixels {
    int n, h, w, c;             // images; the input's height, width, channels
    int rows, columns;          // output pixels of a phase
    int stride_y, stride_x;     // steps through the input
};

// Where sums go: the output with what is added to it, or, where k is split, the part of block z.
struct Result {
    Out y;
    float *parts;
    const float *bias;
    In per_image_bias, residual;
    int m, n, rows, columns;            // of the product; pixels of a phase
    int out_h, out_w;                   // of the whole output
    int first_y, first_x, step_y, step_x; // of the phase's pixels in it
    int flags;                          // 1: bias, 2: image bias, 4: residual

    // Of row m: its place in the output, and its image.
    __device__ __forceinline__ void row(int at, int &place, int &image) const {
        int j = at % columns, i = at / columns % rows;
        image = at / columns / rows;
        place = ((image * out_h + first_y + i * step_y) * out_w + first_x + j * step_x) * n;
    }

    __device__ __forceinline__ float finished(float v, int place, int image, int column) const {
        if (flags & 1) v += bias[column];
        if (flags & 2) v += per_image_bias[image * n + column];
        if (flags & 4) v += residual[place + column];
        return v;
    }

    // Numbers (row, column ..) of the product; the column is a multiple of COUNT.
    template <int COUNT> __device__ __forceinline__ void store(int at, int column, const float (&v)[COUNT]) const {
        if (at >= m || column >= n) return;
        bool whole = n % COUNT == 0;
        if (gridDim.z > 1) {
            int from = (blockIdx.z * m + at) * n + column;
            if (whole) return Out{(u64)parts}.set<COUNT>(from, v);
            for (int i = 0; i < COUNT; i++)
                if (column + i < n) parts[from + i] = v[i];
            return;
        }
        int place, image;
        row(at, place, image);
        if (whole) {
            float sum[COUNT], more[COUNT];
            for (int i = 0; i < COUNT; i++) sum[i] = v[i] + (flags & 1 ? bias[column + i] : 0.0f);
            if (flags & 2) {
                per_image_bias.get<COUNT>(image * n + column, more);
                for (int i = 0; i < COUNT; i++) sum[i] += more[i];
            }
            if (flags & 4) {
                residual.get<COUNT>(place + column, more);
                for (int i = 0; i < COUNT; i++) sum[i] += more[i];
            }
            return y.set<COUNT>(place + column, sum);
        }
        for (int i = 0; i < COUNT; i++)
            if (column + i < n) y.set(place + column + i, finished(v[i], place, image, column + i));
    }
};

// Of a weight gradient [m, n].
__device__ __forceinline__ Result of_weights(Out dw, float *parts, int m, int n) {
    return Result{dw, parts, 0, In{0}, In{0}, m, n, m, 1, m, 1, 0, 0, 1, 1, 0};
}

// What kernels are told of the gathered pixels, and of the result.
#define PIXELS(X)                                                                                                        \
    X x, const Tap *taps, int n, int h, int w, int c, int rows, int columns, int stride_y, int stride_x, int tap_count
#define RESULT                                                                                                           \
    Out y, float *parts, const float *bias, In per_image_bias, In residual, int channels, int out_h, int out_w, int first_y, \
        int first_x, int step_y, int step_x, int flags
#define OF_PIXELS                                                                                                        \
    Pixels { n, h, w, c, rows, columns, stride_y, stride_x }
#define OF_RESULT(M)                                                                                                     \
    Result {                                                                                                             \
        y, parts, bias, per_image_bias, residual, M, channels, rows, columns, out_h, out_w, first_y, first_x, step_y,      \
            step_x, flags                                                                                                \
    }
#endif
