// Products as in conv.cu of tensors that are stored in bf16: factors go from memory to tensor cores as they are, through
// shared memory in several stages (cp.async, ldmatrix). Channels are multiples of 8.
//
//              A[m, k]                                 B[n, k] or B[k, n]                        m         n        k
//   forward    x, gathered: pixel m, (tap, channel) k  weights [n, taps, channels]              pixels    cout     taps cin
//   transpose  the same of dy, by phases               the same of the weights' transpose       pixels    cin      taps cout
//   weights    x, gathered: (tap, channel) m, pixel k  dy [pixels, cout]                         taps cin  cout     pixels

// The chunks of gathered pixels that a thread copies, [pixel][(tap, channel)].
template <int SIDE> struct PixelRows {
    typedef AlongK<SIDE> Layout;
    static const int N = Shares<SIDE>::PER_THREAD;
    const unsigned short *x;
    const Tap *taps;
    Pixels p;
    int k, k_end, tap, channel; // of the thread's chunk, in the next step
    int base[N], y[N], column[N];

    __device__ __forceinline__ PixelRows(In x, const Tap *taps, const Pixels &p, int m, int k_first, int k_end)
        : x(x.halves()), taps(taps), p(p), k_end(k_end) {
        k = k_first + threadIdx.x % Layout::PER_ROW * CHUNK;
        tap = k / p.c;
        channel = k % p.c;
        for (int i = 0; i < N; i++) {
            int row = blockIdx.x * SIDE + (threadIdx.x + i * Shares<SIDE>::BLOCK) / Layout::PER_ROW;
            base[i] = row < m ? row / p.columns / p.rows * p.h : -1;
            y[i] = row / p.columns % p.rows * p.stride_y;
            column[i] = row % p.columns * p.stride_x;
        }
    }

    // Starts the copies of a step.
    __device__ __forceinline__ void copy(uint4 *tile) {
        Tap at{0, 0, 0, 0};
        if (k < k_end) at = taps[tap];
#pragma unroll
        for (int i = 0; i < N; i++) {
            int iy = y[i] + at.dy, ix = column[i] + at.dx, chunk = threadIdx.x + i * Shares<SIDE>::BLOCK;
            bool there = k < k_end && base[i] >= 0 && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
            const unsigned short *from = there ? x + (u64)((base[i] + iy) * p.w + ix) * p.c + channel : x;
            copy_16(tile + Layout::place(chunk / Layout::PER_ROW, chunk % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
        channel += DEPTH;
        while (channel >= p.c) channel -= p.c, tap++;
    }
};

// The same of weights [n, all taps, c].
template <int SIDE> struct WeightRows {
    typedef AlongK<SIDE> Layout;
    static const int N = Shares<SIDE>::PER_THREAD;
    const unsigned short *w;
    const Tap *taps;
    int n, c, all_taps;
    int k, k_end, tap, channel;

    __device__ __forceinline__ WeightRows(const unsigned short *w, const Tap *taps, int n, int c, int all_taps, int k_first,
                                          int k_end)
        : w(w), taps(taps), n(n), c(c), all_taps(all_taps), k_end(k_end) {
        k = k_first + threadIdx.x % Layout::PER_ROW * CHUNK;
        tap = k / c;
        channel = k % c;
    }

    __device__ __forceinline__ void copy(uint4 *tile) {
        int of_tap = k < k_end ? taps[tap].k : 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            int chunk = threadIdx.x + i * Shares<SIDE>::BLOCK, row = chunk / Layout::PER_ROW, column = blockIdx.y * SIDE + row;
            bool there = k < k_end && column < n;
            const unsigned short *from = there ? w + (u64)(column * all_taps + of_tap) * c + channel : w;
            copy_16(tile + Layout::place(row, chunk % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
        channel += DEPTH;
        while (channel >= c) channel -= c, tap++;
    }
};

// Output pixels, one after the other.
struct Walk {
    int image, i, j;

    __device__ __forceinline__ Walk(int pixel, const Pixels &p)
        : image(pixel / p.columns / p.rows), i(pixel / p.columns % p.rows), j(pixel % p.columns) {}

    __device__ __forceinline__ void on(const Pixels &p) {
        j += DEPTH;
        while (j >= p.columns) {
            j -= p.columns;
            if (++i == p.rows) i = 0, image++;
        }
    }
};

// Chunks of gathered pixels, [output pixel][(tap, channel)]: a thread's are all of one tap and channel.
template <int SIDE> struct PixelColumns {
    typedef AlongRows<SIDE> Layout;
    static const int N = Shares<SIDE>::PER_THREAD, APART = Shares<SIDE>::BLOCK / Layout::PER_ROW;
    const unsigned short *x;
    Pixels p;
    Tap tap;
    int channel, k, k_end;
    bool inside;
    Walk walk[N];

    __device__ __forceinline__ PixelColumns(In x, const Tap *taps, const Pixels &p, int m, int k_first, int k_end)
        : PixelColumns(x, taps, p, m, k_first + threadIdx.x / Layout::PER_ROW, k_end,
                       blockIdx.x * SIDE + threadIdx.x % Layout::PER_ROW * CHUNK) {}

    __device__ __forceinline__ void copy(uint4 *tile) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int iy = walk[i].i * p.stride_y + tap.dy, ix = walk[i].j * p.stride_x + tap.dx;
            int row = threadIdx.x / Layout::PER_ROW + i * APART;
            bool there = inside && k + i * APART < k_end && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
            const unsigned short *from = there ? x + (u64)((walk[i].image * p.h + iy) * p.w + ix) * p.c + channel : x;
            copy_16(tile + Layout::place(row, threadIdx.x % Layout::PER_ROW), from, there);
            walk[i].on(p);
        }
        k += DEPTH;
    }

  private:
    __device__ __forceinline__ PixelColumns(In x, const Tap *taps, const Pixels &p, int m, int k, int k_end, int row)
        : x(x.halves()), p(p), tap{0, 0, 0, 0}, channel(row % p.c), k(k), k_end(k_end), inside(row < m),
          walk{Walk(k, p), Walk(k + APART, p)} {
        static_assert(N == 2, "two walks");
        if (inside) tap = taps[row / p.c];
    }
};

// Chunks of a matrix [k, n].
template <int SIDE> struct MatrixColumns {
    typedef AlongRows<SIDE> Layout;
    static const int N = Shares<SIDE>::PER_THREAD, APART = Shares<SIDE>::BLOCK / Layout::PER_ROW;
    const unsigned short *b;
    int n, k, k_end, column;

    __device__ __forceinline__ MatrixColumns(In b, int n, int k_first, int k_end)
        : b(b.halves()), n(n), k(k_first + threadIdx.x / Layout::PER_ROW), k_end(k_end),
          column(blockIdx.y * SIDE + threadIdx.x % Layout::PER_ROW * CHUNK) {}

    __device__ __forceinline__ void copy(uint4 *tile) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            bool there = k + i * APART < k_end && column < n;
            const unsigned short *from = there ? b + (u64)(k + i * APART) * n + column : b;
            copy_16(tile + Layout::place(threadIdx.x / Layout::PER_ROW + i * APART, threadIdx.x % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
    }
};

// -------------------------------------------------------------------------------------------------------- kernels

// Blocks as in conv.cu.
#define HALF_KERNELS(SIDE)                                                                                               \
    extern "C" __global__ void __launch_bounds__(Shares<SIDE>::BLOCK)                                                    \
        conv_half_##SIDE(PIXELS(In), In weights, int all_taps, RESULT, int k_part) {                  \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        PixelRows<SIDE> a(x, taps, OF_PIXELS, m, k_first, k_end);                                                        \
        WeightRows<SIDE> b(weights.halves(), taps, channels, c, all_taps, k_first, k_end);                                        \
        product_half<SIDE>(a, b, OF_RESULT(m), ceil_div(k_end - k_first, DEPTH));                                        \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(Shares<SIDE>::BLOCK)                                                    \
        conv_half_weights_##SIDE(PIXELS(In), In dy, Out dw, float *parts, int channels, int k_part) {                    \
        int m = tap_count * c, k_first = blockIdx.z * k_part, k_end = min(n * rows * columns, k_first + k_part);         \
        PixelColumns<SIDE> a(x, taps, OF_PIXELS, m, k_first, k_end);                                                     \
        MatrixColumns<SIDE> b(dy, channels, k_first, k_end);                                                             \
        product_half<SIDE>(a, b, of_weights(dw, parts, m, channels), ceil_div(k_end - k_first, DEPTH));                  \
    }

#ifdef CONV_HALF_64
HALF_KERNELS(64)
#endif
#ifdef CONV_HALF_128
HALF_KERNELS(128)
#endif

#ifdef WEIGHT_ROWS

// Weights [taps, c, n], or [taps, n, c] where they are `transposed`, as rows [n, taps, c]; places are bytes from `base`.
struct WeightTable {
    u64 from, to;
    int taps, c, n, transposed;
    int first_block, unused;
};

// Of all weights: blocks of 32 x 8 threads for tiles of 32 x 32 of a tap.
extern "C" __global__ void weight_rows(char *base, const WeightTable *table, int count) {
    __shared__ float tile[32][33];
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (table[middle].first_block <= (int)blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    WeightTable t = table[low];
    const float *w = (const float *)(base + t.from);
    Out to{(u64)base + t.to};
    int block = blockIdx.x - t.first_block, of_n = ceil_div(t.n, 32), of_c = ceil_div(t.c, 32);
    int first_n = block % of_n * 32, first_c = block / of_n % of_c * 32, tap = block / of_n / of_c;
    int rows = t.transposed ? t.n : t.c, columns = t.transposed ? t.c : t.n;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = t.transposed ? first_n + i : first_c + i, column = (t.transposed ? first_c : first_n) + threadIdx.x;
        float v = row < rows && column < columns ? w[(tap * rows + row) * columns + column] : 0.0f;
        if (t.transposed)
            tile[i][threadIdx.x] = v;
        else
            tile[threadIdx.x][i] = v;
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = first_n + i, ch = first_c + threadIdx.x;
        if (row < t.n && ch < t.c) to.set((row * t.taps + tap) * t.c + ch, tile[i][threadIdx.x]);
    }
}
#endif
