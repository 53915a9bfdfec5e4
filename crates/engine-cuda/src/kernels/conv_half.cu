// Products as in conv.cu of tensors that are stored in bf16: factors go from memory to tensor cores as they are, through
// shared memory in several stages (cp.async, ldmatrix). Channels are multiples of 8.
//
//              A[m, k]                                 B[n, k] or B[k, n]                        m         n        k
//   forward    x, gathered: pixel m, (tap, channel) k  weights [n, taps, channels]              pixels    cout     taps cin
//   transpose  the same of dy, by phases               the same of the weights' transpose       pixels    cin      taps cout
//   weights    x, gathered: (tap, channel) m, pixel k  dy [pixels, cout]                         taps cin  cout     pixels

// Numbers of a step along k, and of a chunk that is copied at once.
#define DEPTH 32
#define CHUNK 8

// A factor of ROWS rows in shared memory, [row][k] or [k][row], in chunks of 16 bytes. The chunks of a row are exchanged so
// that the eight rows of a matrix lie in different banks.
template <int ROWS> struct AlongK {
    static const int PER_ROW = DEPTH / CHUNK, CHUNKS = ROWS * PER_ROW;

    __device__ static __forceinline__ int place(int row, int chunk) { return row * PER_ROW + (chunk ^ (row >> 1 & 3)); }
};

template <int ROWS> struct AlongRows {
    static const int PER_ROW = ROWS / CHUNK, CHUNKS = DEPTH * PER_ROW;

    __device__ static __forceinline__ int place(int k, int chunk) { return k * PER_ROW + (chunk ^ (k & 7)); }
};

// How a block of SIDE x SIDE results is shared out.
template <int SIDE> struct Shares {
    // 128: 2 x 4 warps of 64 x 32 numbers; 64: 2 x 2 of 32 x 32.
    static const int BLOCK = SIDE == 128 ? 256 : 128, STAGES = SIDE == 128 ? 3 : 4;
    static const int WARP_ROWS = SIDE / 2, WARP_COLUMNS = 32, COLUMN_WARPS = SIDE / 32;
    static const int RT = WARP_ROWS / 16, CT = WARP_COLUMNS / 8;
    static const int PER_THREAD = SIDE * DEPTH / CHUNK / BLOCK;
};

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
    int picture, i, j;

    __device__ __forceinline__ Walk(int pixel, const Pixels &p)
        : picture(pixel / p.columns / p.rows), i(pixel / p.columns % p.rows), j(pixel % p.columns) {}

    __device__ __forceinline__ void on(const Pixels &p) {
        j += DEPTH;
        while (j >= p.columns) {
            j -= p.columns;
            if (++i == p.rows) i = 0, picture++;
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
            const unsigned short *from = there ? x + (u64)((walk[i].picture * p.h + iy) * p.w + ix) * p.c + channel : x;
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

// A warp's fragments from rows `row ..` of a tile, numbers k .. k + 16: the left factor's of 16 rows, or the right factor's of
// 16 columns (two pairs of words).
template <int ROWS> __device__ __forceinline__ void left_fragment(AlongK<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices(to, tile + AlongK<ROWS>::place(row + lane % 16, k / CHUNK + lane / 16));
}

template <int ROWS> __device__ __forceinline__ void left_fragment(AlongRows<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(to, tile + AlongRows<ROWS>::place(k + lane % 8 + lane / 16 * 8, row / CHUNK + lane / 8 % 2));
}

template <int ROWS> __device__ __forceinline__ void right_fragment(AlongK<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices(to, tile + AlongK<ROWS>::place(row + lane % 8 + lane / 16 * 8, k / CHUNK + lane / 8 % 2));
}

template <int ROWS> __device__ __forceinline__ void right_fragment(AlongRows<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(to, tile + AlongRows<ROWS>::place(k + lane % 16, row / CHUNK + lane / 16));
}

// A block's tile: while one stage is multiplied, the next ones are on their way.
template <int SIDE, class A, class B>
__device__ __forceinline__ void product_half(A a, B b, const Result &result, int steps) {
    typedef Shares<SIDE> T;
    typedef typename A::Layout LayoutA;
    typedef typename B::Layout LayoutB;
    const int STAGE = LayoutA::CHUNKS + LayoutB::CHUNKS;
    __shared__ uint4 memory[T::STAGES * STAGE];
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int warp_row = warp / T::COLUMN_WARPS * T::WARP_ROWS, warp_column = warp % T::COLUMN_WARPS * T::WARP_COLUMNS;
    float sums[T::RT][T::CT][4];
#pragma unroll
    for (int i = 0; i < T::RT; i++)
#pragma unroll
        for (int j = 0; j < T::CT; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) sums[i][j][l] = 0.0f;
    for (int stage = 0; stage < T::STAGES - 1; stage++) {
        if (stage < steps) {
            a.copy(memory + stage * STAGE);
            b.copy(memory + stage * STAGE + LayoutA::CHUNKS);
        }
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_copies<T::STAGES - 2>();
        __syncthreads();
        if (step + T::STAGES - 1 < steps) {
            uint4 *next = memory + (step + T::STAGES - 1) % T::STAGES * STAGE;
            a.copy(next);
            b.copy(next + LayoutA::CHUNKS);
        }
        commit_copies();
        const uint4 *of_a = memory + step % T::STAGES * STAGE, *of_b = of_a + LayoutA::CHUNKS;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            u32 left[T::RT][4], right[T::CT / 2][4];
#pragma unroll
            for (int i = 0; i < T::RT; i++) left_fragment(LayoutA(), of_a, warp_row + i * 16, k, left[i]);
#pragma unroll
            for (int j = 0; j < T::CT / 2; j++) right_fragment(LayoutB(), of_b, warp_column + j * 16, k, right[j]);
#pragma unroll
            for (int i = 0; i < T::RT; i++)
#pragma unroll
                for (int j = 0; j < T::CT; j++) {
                    u32 words[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(sums[i][j], left[i], words);
                }
        }
    }
    wait_copies<0>();
    int first_row = blockIdx.x * SIDE + warp_row + g, first_column = blockIdx.y * SIDE + warp_column + 2 * t;
#pragma unroll
    for (int i = 0; i < T::RT; i++)
#pragma unroll
        for (int j = 0; j < T::CT; j++) {
            float upper[2] = {sums[i][j][0], sums[i][j][1]}, lower[2] = {sums[i][j][2], sums[i][j][3]};
            result.store(first_row + i * 16, first_column + j * 8, upper);
            result.store(first_row + i * 16 + 8, first_column + j * 8, lower);
        }
}

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

HALF_KERNELS(64)
HALF_KERNELS(128)

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
