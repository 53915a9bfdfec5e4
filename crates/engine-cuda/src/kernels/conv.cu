// Convolution, its transpose and its weight gradient as implicit matrix products, and plain matrix products (1x1).
//
// C[m, n] = sum over k of A[m, k] B[k, n], in tiles of a block of 256 threads. The factors come through shared memory in
// steps of 16 words of 32 bits along k: f32 numbers for the plain arithmetic, tf32 numbers or pairs of bf16 numbers for
// tensor cores. Where there are few tiles, k is split over blocks (z), whose sums `conv_finish` adds in order.
//
//              A[m, k]                                         B[k, n]                      m        n     k
//   forward    x, gathered: pixel m, (tap, channel) k          w [taps, cin, cout]          pixels   cout  taps cin
//   transpose  x, gathered: pixel m of a phase                 w, transposed                pixels   cin   taps cout
//   weights    x, gathered: (tap, channel) m, pixel k          dy [pixels, cout]            taps cin cout  pixels
//
// A tap is a fixed offset: output pixel (i, j) of a phase meets input pixel (i stride_y + dy, j stride_x + dx).

__device__ __forceinline__ float4 zeros() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

// Numbers in f32, with what `In` has: kernels for f32 ask no format.
struct Floats {
    const float *p;

    __device__ __forceinline__ float operator[](int i) const { return p[i]; }
};

__device__ __forceinline__ float4 four(Floats x, int i) { return *(const float4 *)(x.p + i); }

__device__ __forceinline__ float4 four(In x, int i) {
    float v[4];
    x.get<4>(i, v);
    return make_float4(v[0], v[1], v[2], v[3]);
}

// ------------------------------------------------------------------------------------------------------- factors

// A factor gives four numbers that are neighbours in memory: along k (`ALONG_K`) or along its other side. `place` says
// once which rows a thread will ask for. X: `Floats` or `In`.

// Gathered pixels, along k.
template <int SLOTS, class X> struct GatherK {
    static const bool ALONG_K = true;
    X x;
    const Tap *taps;
    Pixels p;
    int m, k_end;
    int base[SLOTS], y[SLOTS], column[SLOTS];

    __device__ __forceinline__ void place(int slot, int row) {
        int j = row % p.columns, i = row / p.columns % p.rows, image = row / p.columns / p.rows;
        base[slot] = row < m ? image * p.h : -1;
        y[slot] = i * p.stride_y;
        column[slot] = j * p.stride_x;
    }

    // The first number of a pixel; -1 outside.
    __device__ __forceinline__ int pixel(int slot, const Tap &tap) const {
        int iy = y[slot] + tap.dy, ix = column[slot] + tap.dx;
        bool inside = base[slot] >= 0 && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
        return inside ? ((base[slot] + iy) * p.w + ix) * p.c : -1;
    }

    __device__ __forceinline__ float4 get(int slot, int k) const {
        if (p.c % 4 == 0) {
            if (k >= k_end) return zeros();
            int from = pixel(slot, taps[k / p.c]);
            return from < 0 ? zeros() : four(x, from + k % p.c);
        }
        float v[4];
        for (int i = 0; i < 4; i++) {
            int from = k + i < k_end ? pixel(slot, taps[(k + i) / p.c]) : -1;
            v[i] = from < 0 ? 0.0f : x[from + (k + i) % p.c];
        }
        return make_float4(v[0], v[1], v[2], v[3]);
    }
};

// Gathered pixels, along (tap, channel), which here is m; k counts output pixels.
template <class X> struct GatherM {
    static const bool ALONG_K = false;
    X x;
    const Tap *taps;
    Pixels p;
    int m, k_end;

    __device__ __forceinline__ float number(int row, int i, int j, int image) const {
        if (row >= m) return 0.0f;
        Tap tap = taps[row / p.c];
        int iy = i * p.stride_y + tap.dy, ix = j * p.stride_x + tap.dx;
        bool inside = (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
        return inside ? x[((image * p.h + iy) * p.w + ix) * p.c + row % p.c] : 0.0f;
    }

    __device__ __forceinline__ float4 get(int row, int k) const {
        if (k >= k_end || row >= m) return zeros();
        int j = k % p.columns, i = k / p.columns % p.rows, image = k / p.columns / p.rows;
        if (p.c % 4 == 0) {
            Tap tap = taps[row / p.c];
            int iy = i * p.stride_y + tap.dy, ix = j * p.stride_x + tap.dx;
            if ((u32)iy >= (u32)p.h || (u32)ix >= (u32)p.w) return zeros();
            return four(x, ((image * p.h + iy) * p.w + ix) * p.c + row % p.c);
        }
        return make_float4(number(row, i, j, image), number(row + 1, i, j, image), number(row + 2, i, j, image),
                           number(row + 3, i, j, image));
    }
};

// A matrix [k, n], along n.
template <class X> struct Matrix {
    static const bool ALONG_K = false;
    X b;
    int n, k_end;

    __device__ __forceinline__ float number(int k, int column) const { return column < n ? b[k * n + column] : 0.0f; }

    __device__ __forceinline__ float4 get(int column, int k) const {
        if (k >= k_end) return zeros();
        if (n % 4 == 0 && column + 4 <= n) return four(b, k * n + column);
        return make_float4(number(k, column), number(k, column + 1), number(k, column + 2), number(k, column + 3));
    }
};

// Weights [taps, n, c] for products over (tap, c), along c.
template <int SLOTS> struct Transposed {
    static const bool ALONG_K = true;
    const float *w;
    const Tap *taps;
    int n, c, k_end;
    int column[SLOTS];

    __device__ __forceinline__ void place(int slot, int row) { column[slot] = row; }

    __device__ __forceinline__ float4 get(int slot, int k) const {
        if (column[slot] >= n) return zeros();
        if (c % 4 == 0) {
            if (k >= k_end) return zeros();
            return *(const float4 *)(w + (taps[k / c].k * n + column[slot]) * c + k % c);
        }
        float v[4];
        for (int i = 0; i < 4; i++)
            v[i] = k + i < k_end ? w[(taps[(k + i) / c].k * n + column[slot]) * c + (k + i) % c] : 0.0f;
        return make_float4(v[0], v[1], v[2], v[3]);
    }
};

// -------------------------------------------------------------------------------------------------- plain products

// Words of a step along k.
#define WORDS 16

// How a tile of a factor with ROWS rows lies in shared memory, and how it gets there. Each thread moves groups of four
// rows or of four words.
template <int ROWS, bool ALONG_K> struct Plain {
    static const int STRIDE = ROWS + 4, GROUPS = ROWS * WORDS / 4 / 256, LENGTH = WORDS * STRIDE;

    template <class F> __device__ static __forceinline__ void place(F &f, int first) {
        if constexpr (ALONG_K)
            for (int i = 0; i < GROUPS; i++) f.place(i, first + (threadIdx.x + i * 256) / 4);
    }

    template <class F> __device__ static __forceinline__ void load(const F &f, int first, int k, float4 (&to)[GROUPS]) {
        for (int i = 0; i < GROUPS; i++) {
            int at = threadIdx.x + i * 256;
            if constexpr (ALONG_K)
                to[i] = f.get(i, k + at % 4 * 4);
            else
                to[i] = f.get(first + at % (ROWS / 4) * 4, k + at / (ROWS / 4));
        }
    }

    __device__ static __forceinline__ void store(const float4 (&from)[GROUPS], float *tile) {
        for (int i = 0; i < GROUPS; i++) {
            int at = threadIdx.x + i * 256;
            if constexpr (ALONG_K) {
                float *to = tile + at % 4 * 4 * STRIDE + at / 4;
                to[0] = from[i].x;
                to[STRIDE] = from[i].y;
                to[2 * STRIDE] = from[i].z;
                to[3 * STRIDE] = from[i].w;
            } else {
                *(float4 *)(tile + at / (ROWS / 4) * STRIDE + at % (ROWS / 4) * 4) = from[i];
            }
        }
    }
};

// A block's tile in f32. Each thread has fours of rows and columns: (ROWS / 16) x (COLUMNS / 16) numbers.
template <int ROWS, int COLUMNS, class A, class B>
__device__ __forceinline__ void product_f32(A a, B b, const Result &result, int k_first, int k_end) {
    typedef Plain<ROWS, A::ALONG_K> TileA;
    typedef Plain<COLUMNS, B::ALONG_K> TileB;
    const int RF = ROWS / 64, CF = COLUMNS / 64;
    __shared__ float4 memory[(TileA::LENGTH + TileB::LENGTH) / 2];
    float *tiles = (float *)memory;
    int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sums[RF * 4][CF][4];
    for (int i = 0; i < RF * 4; i++)
        for (int j = 0; j < CF; j++)
            for (int l = 0; l < 4; l++) sums[i][j][l] = 0.0f;
    float4 next_a[TileA::GROUPS], next_b[TileB::GROUPS];
    TileA::place(a, first_row);
    TileB::place(b, first_column);
    TileA::load(a, first_row, k_first, next_a);
    TileB::load(b, first_column, k_first, next_b);
    for (int k = k_first, side = 0; k < k_end; k += WORDS, side ^= 1) {
        float *tile_a = tiles + side * (TileA::LENGTH + TileB::LENGTH), *tile_b = tile_a + TileA::LENGTH;
        TileA::store(next_a, tile_a);
        TileB::store(next_b, tile_b);
        __syncthreads();
        if (k + WORDS < k_end) {
            TileA::load(a, first_row, k + WORDS, next_a);
            TileB::load(b, first_column, k + WORDS, next_b);
        }
#pragma unroll
        for (int word = 0; word < WORDS; word++) {
            float4 va[RF], vb[CF];
#pragma unroll
            for (int i = 0; i < RF; i++) va[i] = *(const float4 *)(tile_a + word * TileA::STRIDE + i * 64 + ty * 4);
#pragma unroll
            for (int j = 0; j < CF; j++) vb[j] = *(const float4 *)(tile_b + word * TileB::STRIDE + j * 64 + tx * 4);
#pragma unroll
            for (int i = 0; i < RF; i++)
#pragma unroll
                for (int j = 0; j < CF; j++) {
                    float of_a[4] = {va[i].x, va[i].y, va[i].z, va[i].w};
                    float of_b[4] = {vb[j].x, vb[j].y, vb[j].z, vb[j].w};
#pragma unroll
                    for (int r = 0; r < 4; r++)
#pragma unroll
                        for (int l = 0; l < 4; l++)
                            sums[i * 4 + r][j][l] = fmaf(of_a[r], of_b[l], sums[i * 4 + r][j][l]);
                }
        }
    }
#pragma unroll
    for (int i = 0; i < RF * 4; i++)
#pragma unroll
        for (int j = 0; j < CF; j++)
            result.store(first_row + i / 4 * 64 + ty * 4 + i % 4, first_column + j * 64 + tx * 4, sums[i][j]);
}

// ------------------------------------------------------------------------------------- products on tensor cores

// Rows lie one behind the other (20 words each, so that a fragment's 32 words lie in different banks), or words do
// (ROWS + 8 each, likewise).
template <int ROWS, bool ALONG_K, bool BF16> struct Fragments {
    static const int STRIDE = ALONG_K ? WORDS + 4 : ROWS + 8, LENGTH = ALONG_K ? ROWS * STRIDE : WORDS * STRIDE;
    static const int GROUPS = ROWS * WORDS / 4 / 256, PER = BF16 ? 2 : 1;

    template <class F> __device__ static __forceinline__ void place(F &f, int first) {
        if constexpr (ALONG_K)
            for (int i = 0; i < GROUPS; i++) f.place(i, first + (threadIdx.x + i * 256) / 4);
    }

    template <class F>
    __device__ static __forceinline__ void load(const F &f, int first, int k, float4 (&to)[GROUPS * PER]) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            int at = threadIdx.x + i * 256;
#pragma unroll
            for (int j = 0; j < PER; j++) {
                if constexpr (ALONG_K)
                    to[i * PER + j] = f.get(i, k + (at % 4 * PER + j) * 4);
                else
                    to[i * PER + j] = f.get(first + at % (ROWS / 4) * 4, k + at / (ROWS / 4) * PER + j);
            }
        }
    }

    __device__ static __forceinline__ void store(const float4 (&from)[GROUPS * PER], u32 *tile) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            int at = threadIdx.x + i * 256;
            float4 a = from[i * PER], b = from[i * PER + PER - 1];
            uint4 words;
            if (!BF16)
                words = make_uint4(round_tf32(a.x), round_tf32(a.y), round_tf32(a.z), round_tf32(a.w));
            else if (ALONG_K)
                words = make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w));
            else
                words = make_uint4(pack_bf16(a.x, b.x), pack_bf16(a.y, b.y), pack_bf16(a.z, b.z), pack_bf16(a.w, b.w));
            int to = ALONG_K ? at / 4 * STRIDE + at % 4 * 4 : at / (ROWS / 4) * STRIDE + at % (ROWS / 4) * 4;
            *(uint4 *)(tile + to) = words;
        }
    }

    __device__ static __forceinline__ u32 word(const u32 *tile, int row, int word) {
        return ALONG_K ? tile[row * STRIDE + word] : tile[word * STRIDE + row];
    }
};

// A block's tile on tensor cores: eight warps, two by four.
template <int ROWS, int COLUMNS, bool BF16, class A, class B>
__device__ __forceinline__ void product_mma(A a, B b, const Result &result, int k_first, int k_end) {
    typedef Fragments<ROWS, A::ALONG_K, BF16> TileA;
    typedef Fragments<COLUMNS, B::ALONG_K, BF16> TileB;
    const int WR = ROWS / 2, WC = COLUMNS / 4, RT = WR / 16, CT = WC / 8, STEP = WORDS * TileA::PER;
    __shared__ uint4 memory[(TileA::LENGTH + TileB::LENGTH) / 2];
    u32 *tiles = (u32 *)memory;
    int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int warp_row = warp / 4 * WR, warp_column = warp % 4 * WC;
    float sums[RT][CT][4];
    for (int i = 0; i < RT; i++)
        for (int j = 0; j < CT; j++)
            for (int l = 0; l < 4; l++) sums[i][j][l] = 0.0f;
    float4 next_a[TileA::GROUPS * TileA::PER], next_b[TileB::GROUPS * TileB::PER];
    TileA::place(a, first_row);
    TileB::place(b, first_column);
    TileA::load(a, first_row, k_first, next_a);
    TileB::load(b, first_column, k_first, next_b);
    for (int k = k_first, side = 0; k < k_end; k += STEP, side ^= 1) {
        u32 *tile_a = tiles + side * (TileA::LENGTH + TileB::LENGTH), *tile_b = tile_a + TileA::LENGTH;
        TileA::store(next_a, tile_a);
        TileB::store(next_b, tile_b);
        __syncthreads();
        if (k + STEP < k_end) {
            TileA::load(a, first_row, k + STEP, next_a);
            TileB::load(b, first_column, k + STEP, next_b);
        }
#pragma unroll
        for (int word = 0; word < WORDS; word += 8) {
            u32 fb[CT][2];
#pragma unroll
            for (int j = 0; j < CT; j++) {
                int column = warp_column + j * 8 + g;
                fb[j][0] = TileB::word(tile_b, column, word + t);
                fb[j][1] = TileB::word(tile_b, column, word + t + 4);
            }
#pragma unroll
            for (int i = 0; i < RT; i++) {
                int row = warp_row + i * 16 + g;
                u32 fa[4] = {TileA::word(tile_a, row, word + t), TileA::word(tile_a, row + 8, word + t),
                             TileA::word(tile_a, row, word + t + 4), TileA::word(tile_a, row + 8, word + t + 4)};
#pragma unroll
                for (int j = 0; j < CT; j++) {
                    if (BF16)
                        mma_bf16(sums[i][j], fa, fb[j]);
                    else
                        mma_tf32(sums[i][j], fa, fb[j]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < RT; i++)
#pragma unroll
        for (int j = 0; j < CT; j++) {
            int row = first_row + warp_row + i * 16 + g, column = first_column + warp_column + j * 8 + 2 * t;
            float upper[2] = {sums[i][j][0], sums[i][j][1]}, lower[2] = {sums[i][j][2], sums[i][j][3]};
            result.store(row, column, upper);
            result.store(row + 8, column, lower);
        }
}

// -------------------------------------------------------------------------------------------------------- kernels

// MATH: 0 f32, 1 tf32, 2 bf16.
template <int MATH, int TILE, class A, class B>
__device__ __forceinline__ void product(A a, B b, const Result &result, int k_first, int k_end) {
    if constexpr (MATH == 0)
        product_f32<TILE, TILE>(a, b, result, k_first, k_end);
    else
        product_mma<TILE, TILE, MATH == 2>(a, b, result, k_first, k_end);
}

#define SLOTS(TILE) (TILE * WORDS / 4 / 256)

// Blocks (x: rows of the product, y: columns, z: parts of k, `k_part` numbers each). X: the format of x and dy.
#define KERNELS(MATH, TILE, NAME, X)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) conv_##NAME(PIXELS(X), const float *weights, RESULT, int k_part) { \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        GatherK<SLOTS(TILE), X> a{x, taps, OF_PIXELS, m, k_end};                                                         \
        Matrix<Floats> b{{weights}, channels, k_end};                                                                    \
        product<MATH, TILE>(a, b, OF_RESULT(m), k_first, k_end);                                                         \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        conv_transposed_##NAME(PIXELS(X), const float *weights, RESULT, int k_part) {                                    \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        GatherK<SLOTS(TILE), X> a{x, taps, OF_PIXELS, m, k_end};                                                         \
        Transposed<SLOTS(TILE)> b{weights, taps, channels, c, k_end};                                                    \
        product<MATH, TILE>(a, b, OF_RESULT(m), k_first, k_end);                                                         \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        conv_weights_##NAME(PIXELS(X), X dy, Out dw, float *parts, int channels, int k_part) {                           \
        int m = tap_count * c, k_first = blockIdx.z * k_part, k_end = min(n * rows * columns, k_first + k_part);         \
        GatherM<X> a{x, taps, OF_PIXELS, m, k_end};                                                                      \
        Matrix<X> b{dy, channels, k_end};                                                                                \
        product<MATH, TILE>(a, b, of_weights(dw, parts, m, channels), k_first, k_end);                                   \
    }

#ifdef CONV_f32_64
KERNELS(0, 64, f32_64, Floats)
#endif
#ifdef CONV_f32_128
KERNELS(0, 128, f32_128, Floats)
#endif
#ifdef CONV_tf32_64
KERNELS(1, 64, tf32_64, Floats)
#endif
#ifdef CONV_tf32_128
KERNELS(1, 128, tf32_128, Floats)
#endif
#ifdef CONV_bf16_64
KERNELS(2, 64, bf16_64, In)
#endif
#ifdef CONV_bf16_128
KERNELS(2, 128, bf16_128, In)
#endif

#ifdef CONV_FINISH
// Adds the parts of k in order, and what belongs to the result.
extern "C" __global__ void conv_finish(int count, int m, int rows, int columns, RESULT) {
    Result result = OF_RESULT(m);
    for (int i = thread_of_grid(); i < m * channels; i += threads_of_grid()) {
        float sum = 0.0f;
#pragma unroll 4
        for (int part = 0; part < count; part++) sum += parts[part * m * channels + i];
        int place, image;
        result.row(i / channels, place, image);
        y.set(place + i % channels, result.finished(sum, place, image, i % channels));
    }
}
#endif
