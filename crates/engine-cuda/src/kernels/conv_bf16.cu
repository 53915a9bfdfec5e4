// Products as in conv.cu for tensors stored in bf16: operands go from global memory to tensor cores unconverted, through several
// stages of shared memory (cp.async, ldmatrix). Channels are multiples of 8.
//
//              A[m, k]                                 B[n, k] or B[k, n]                        m         n        k
//   forward    x, gathered: pixel m, (tap, channel) k  weights [n, taps, channels]              pixels    cout     taps cin
//   transpose  the same of dy, by phases               the same of the weights' transpose       pixels    cin      taps cout
//   weights    x, gathered: (tap, channel) m, pixel k  dy [pixels, cout]                         taps cin  cout     pixels

// Gathered pixels, [pixel][(tap, channel)]: the chunks that a thread copies.
template <int SIDE> struct PixelRows {
    typedef AlongK<SIDE> Layout;
    static const int N = BlockTile<SIDE>::PER_THREAD;
    const unsigned short *x;
    const Tap *taps;
    Pixels p;
    int k, k_end, tap, channel; // of the thread's chunk, in the next step
    int base[N], y[N], column[N];

    __device__ __forceinline__ PixelRows(In x, const Tap *taps, const Pixels &p, int m, int k_first, int k_end)
        : x(x.bf16_ptr()), taps(taps), p(p), k_end(k_end) {
        k = k_first + threadIdx.x % Layout::PER_ROW * CHUNK;
        tap = k / p.c;
        channel = k % p.c;
        for (int i = 0; i < N; i++) {
            int row = blockIdx.x * SIDE + (threadIdx.x + i * BlockTile<SIDE>::BLOCK) / Layout::PER_ROW;
            base[i] = row < m ? row / p.columns / p.rows * p.h : -1;
            y[i] = row / p.columns % p.rows * p.stride_y;
            column[i] = row % p.columns * p.stride_x;
        }
    }

    // Starts the copies of one step.
    __device__ __forceinline__ void copy(uint4 *tile) {
        Tap at{0, 0, 0, 0};
        if (k < k_end) at = taps[tap];
#pragma unroll
        for (int i = 0; i < N; i++) {
            int iy = y[i] + at.dy, ix = column[i] + at.dx, chunk = threadIdx.x + i * BlockTile<SIDE>::BLOCK;
            bool there = k < k_end && base[i] >= 0 && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
            const unsigned short *from = there ? x + (u64)((base[i] + iy) * p.w + ix) * p.c + channel : x;
            copy_16(tile + Layout::swizzle(chunk / Layout::PER_ROW, chunk % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
        channel += DEPTH;
        while (channel >= p.c) channel -= p.c, tap++;
    }
};

// The same for weights [n, all taps, c].
template <int SIDE> struct WeightRows {
    typedef AlongK<SIDE> Layout;
    static const int N = BlockTile<SIDE>::PER_THREAD;
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
            int chunk = threadIdx.x + i * BlockTile<SIDE>::BLOCK, row = chunk / Layout::PER_ROW, column = blockIdx.y * SIDE + row;
            bool there = k < k_end && column < n;
            const unsigned short *from = there ? w + (u64)(column * all_taps + of_tap) * c + channel : w;
            copy_16(tile + Layout::swizzle(row, chunk % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
        channel += DEPTH;
        while (channel >= c) channel -= c, tap++;
    }
};

// A cursor over output pixels.
struct PixelCursor {
    int image, i, j;

    __device__ __forceinline__ PixelCursor(int pixel, const Pixels &p)
        : image(pixel / p.columns / p.rows), i(pixel / p.columns % p.rows), j(pixel % p.columns) {}

    __device__ __forceinline__ void advance(const Pixels &p) {
        j += DEPTH;
        while (j >= p.columns) {
            j -= p.columns;
            if (++i == p.rows) i = 0, image++;
        }
    }
};

// Gathered pixels, [output pixel][(tap, channel)]: all chunks of a thread have the same tap and channel.
template <int SIDE> struct PixelColumns {
    typedef AlongRows<SIDE> Layout;
    static const int N = BlockTile<SIDE>::PER_THREAD, ROW_STEP = BlockTile<SIDE>::BLOCK / Layout::PER_ROW;
    const unsigned short *x;
    Pixels p;
    Tap tap;
    int channel, k, k_end;
    bool inside;
    PixelCursor cursor[N];

    __device__ __forceinline__ PixelColumns(In x, const Tap *taps, const Pixels &p, int m, int k_first, int k_end)
        : PixelColumns(x, taps, p, m, k_first + threadIdx.x / Layout::PER_ROW, k_end,
                       blockIdx.x * SIDE + threadIdx.x % Layout::PER_ROW * CHUNK) {}

    __device__ __forceinline__ void copy(uint4 *tile) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int iy = cursor[i].i * p.stride_y + tap.dy, ix = cursor[i].j * p.stride_x + tap.dx;
            int row = threadIdx.x / Layout::PER_ROW + i * ROW_STEP;
            bool there = inside && k + i * ROW_STEP < k_end && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
            const unsigned short *from = there ? x + (u64)((cursor[i].image * p.h + iy) * p.w + ix) * p.c + channel : x;
            copy_16(tile + Layout::swizzle(row, threadIdx.x % Layout::PER_ROW), from, there);
            cursor[i].advance(p);
        }
        k += DEPTH;
    }

  private:
    __device__ __forceinline__ PixelColumns(In x, const Tap *taps, const Pixels &p, int m, int k, int k_end, int row)
        : x(x.bf16_ptr()), p(p), tap{0, 0, 0, 0}, channel(row % p.c), k(k), k_end(k_end), inside(row < m),
          cursor{PixelCursor(k, p), PixelCursor(k + ROW_STEP, p)} {
        static_assert(N == 2, "two walks");
        if (inside) tap = taps[row / p.c];
    }
};

// Chunks of a matrix [k, n].
template <int SIDE> struct MatrixColumns {
    typedef AlongRows<SIDE> Layout;
    static const int N = BlockTile<SIDE>::PER_THREAD, ROW_STEP = BlockTile<SIDE>::BLOCK / Layout::PER_ROW;
    const unsigned short *b;
    int n, k, k_end, column;

    __device__ __forceinline__ MatrixColumns(In b, int n, int k_first, int k_end)
        : b(b.bf16_ptr()), n(n), k(k_first + threadIdx.x / Layout::PER_ROW), k_end(k_end),
          column(blockIdx.y * SIDE + threadIdx.x % Layout::PER_ROW * CHUNK) {}

    __device__ __forceinline__ void copy(uint4 *tile) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            bool there = k + i * ROW_STEP < k_end && column < n;
            const unsigned short *from = there ? b + (u64)(k + i * ROW_STEP) * n + column : b;
            copy_16(tile + Layout::swizzle(threadIdx.x / Layout::PER_ROW + i * ROW_STEP, threadIdx.x % Layout::PER_ROW), from, there);
        }
        k += DEPTH;
    }
};

// -------------------------------------------------------------------------------------------------------- kernels

// Blocks as in conv.cu.
#define BF16_KERNELS(SIDE)                                                                                               \
    extern "C" __global__ void __launch_bounds__(BlockTile<SIDE>::BLOCK)                                                    \
        conv_stored_bf16_##SIDE(PIXEL_PARAMS(In), In weights, int all_taps, EPILOGUE_PARAMS, int k_part) {                  \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        PixelRows<SIDE> a(x, taps, MAKE_PIXELS, m, k_first, k_end);                                                        \
        WeightRows<SIDE> b(weights.bf16_ptr(), taps, channels, c, all_taps, k_first, k_end);                                        \
        matmul_bf16<SIDE>(a, b, MAKE_EPILOGUE(m), ceil_div(k_end - k_first, DEPTH));                                        \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(BlockTile<SIDE>::BLOCK)                                                    \
        conv_stored_bf16_weight_grad_##SIDE(PIXEL_PARAMS(In), In dy, Out dw, float *parts, int channels, int k_part) {                    \
        int m = tap_count * c, k_first = blockIdx.z * k_part, k_end = min(n * rows * columns, k_first + k_part);         \
        PixelColumns<SIDE> a(x, taps, MAKE_PIXELS, m, k_first, k_end);                                                     \
        MatrixColumns<SIDE> b(dy, channels, k_first, k_end);                                                             \
        matmul_bf16<SIDE>(a, b, weight_grad_epilogue(dw, parts, m, channels), ceil_div(k_end - k_first, DEPTH));                  \
    }

#ifdef CONV_STORED_BF16_64
BF16_KERNELS(64)
#endif
#ifdef CONV_STORED_BF16_128
BF16_KERNELS(128)
#endif

#ifdef REPACK_WEIGHTS

// Weights [taps, c, n] ([taps, n, c] if `transposed`) to be repacked as rows [n, taps, c]; addresses are byte offsets from `base`.
struct WeightTable {
    u64 from, to;
    int taps, c, n, transposed;
    int first_block, unused;
};

// Repacks all weights: blocks of 32 x 8 threads, each for a 32 x 32 tile of one tap.
extern "C" __global__ void repack_weights(char *base, const WeightTable *table, int count) {
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
