// Convolution, its transpose and its weight gradient as implicit GEMM, and plain matrix products (1x1).
//
// C[m, n] = sum over k of A[m, k] B[k, n], one tile per block of 256 threads. Operands go through shared memory in steps of 16
// 32-bit words along k: f32 elements for FMA, tf32 elements or pairs of bf16 elements for tensor cores. If there are few tiles,
// k is split over blocks (z), whose partial sums `conv_split_k_reduce` adds in order.
//
//              A[m, k]                                         B[k, n]                      m        n     k
//   forward    x, gathered: pixel m, (tap, channel) k          w [taps, cin, cout]          pixels   cout  taps cin
//   transpose  x, gathered: pixel m of a phase                 w, transposed                pixels   cin   taps cout
//   weights    x, gathered: (tap, channel) m, pixel k          dy [pixels, cout]            taps cin cout  pixels
//
// A tap is a fixed offset: output pixel (i, j) of a phase reads input pixel (i stride_y + dy, j stride_x + dx).

__device__ __forceinline__ float4 zeros() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

// An f32 tensor with the interface of `In`, so that f32 kernels do not check the format.
struct F32In {
    const float *p;

    __device__ __forceinline__ float operator[](int i) const { return p[i]; }
};

__device__ __forceinline__ float4 load4(F32In x, int i) { return *(const float4 *)(x.p + i); }

__device__ __forceinline__ float4 load4(In x, int i) {
    float v[4];
    x.get<4>(i, v);
    return make_float4(v[0], v[1], v[2], v[3]);
}

// ------------------------------------------------------------------------------------------------------ operands

// An operand returns four elements that are adjacent in memory: along k (`ALONG_K`) or along its other dimension. `prepare`
// fixes, once, the rows that a thread will request. X: `F32In` or `In`.

// Gathered pixels, contiguous along k.
template <int SLOTS, class X> struct GatherK {
    static const bool ALONG_K = true;
    X x;
    const Tap *taps;
    Pixels p;
    int m, k_end;
    int base[SLOTS], y[SLOTS], column[SLOTS];

    __device__ __forceinline__ void prepare(int slot, int row) {
        int j = row % p.columns, i = row / p.columns % p.rows, image = row / p.columns / p.rows;
        base[slot] = row < m ? image * p.h : -1;
        y[slot] = i * p.stride_y;
        column[slot] = j * p.stride_x;
    }

    // Index of a pixel's first element; -1 outside of the image.
    __device__ __forceinline__ int pixel(int slot, const Tap &tap) const {
        int iy = y[slot] + tap.dy, ix = column[slot] + tap.dx;
        bool inside = base[slot] >= 0 && (u32)iy < (u32)p.h && (u32)ix < (u32)p.w;
        return inside ? ((base[slot] + iy) * p.w + ix) * p.c : -1;
    }

    __device__ __forceinline__ float4 get(int slot, int k) const {
        if (p.c % 4 == 0) {
            if (k >= k_end) return zeros();
            int from = pixel(slot, taps[k / p.c]);
            return from < 0 ? zeros() : load4(x, from + k % p.c);
        }
        float v[4];
        for (int i = 0; i < 4; i++) {
            int from = k + i < k_end ? pixel(slot, taps[(k + i) / p.c]) : -1;
            v[i] = from < 0 ? 0.0f : x[from + (k + i) % p.c];
        }
        return make_float4(v[0], v[1], v[2], v[3]);
    }
};

// Gathered pixels, contiguous along (tap, channel), which is m here; k counts output pixels.
template <class X> struct GatherM {
    static const bool ALONG_K = false;
    X x;
    const Tap *taps;
    Pixels p;
    int m, k_end;

    __device__ __forceinline__ float element(int row, int i, int j, int image) const {
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
            return load4(x, ((image * p.h + iy) * p.w + ix) * p.c + row % p.c);
        }
        return make_float4(element(row, i, j, image), element(row + 1, i, j, image), element(row + 2, i, j, image),
                           element(row + 3, i, j, image));
    }
};

// A matrix [k, n], contiguous along n.
template <class X> struct Matrix {
    static const bool ALONG_K = false;
    X b;
    int n, k_end;

    __device__ __forceinline__ float element(int k, int column) const { return column < n ? b[k * n + column] : 0.0f; }

    __device__ __forceinline__ float4 get(int column, int k) const {
        if (k >= k_end) return zeros();
        if (n % 4 == 0 && column + 4 <= n) return load4(b, k * n + column);
        return make_float4(element(k, column), element(k, column + 1), element(k, column + 2), element(k, column + 3));
    }
};

// Weights [taps, n, c] for products over (tap, c), contiguous along c.
template <int SLOTS> struct Transposed {
    static const bool ALONG_K = true;
    const float *w;
    const Tap *taps;
    int n, c, k_end;
    int column[SLOTS];

    __device__ __forceinline__ void prepare(int slot, int row) { column[slot] = row; }

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

// ----------------------------------------------------------------------------------------------- products with FMA

// Words per step along k.
#define WORDS 16

// Layout of an operand tile with ROWS rows in shared memory, and how it is filled. Each thread moves groups of four rows or four
// words.
template <int ROWS, bool ALONG_K> struct F32Tile {
    static const int STRIDE = ROWS + 4, GROUPS = ROWS * WORDS / 4 / 256, LENGTH = WORDS * STRIDE;

    template <class F> __device__ static __forceinline__ void prepare(F &f, int first) {
        if constexpr (ALONG_K)
            for (int i = 0; i < GROUPS; i++) f.prepare(i, first + (threadIdx.x + i * 256) / 4);
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

// One block's tile in f32. Each thread computes groups of 4 x 4: (ROWS / 16) x (COLUMNS / 16) elements.
template <int ROWS, int COLUMNS, class A, class B>
__device__ __forceinline__ void matmul_f32(A a, B b, const Epilogue &result, int k_first, int k_end) {
    typedef F32Tile<ROWS, A::ALONG_K> TileA;
    typedef F32Tile<COLUMNS, B::ALONG_K> TileB;
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
    TileA::prepare(a, first_row);
    TileB::prepare(b, first_column);
    TileA::load(a, first_row, k_first, next_a);
    TileB::load(b, first_column, k_first, next_b);
    for (int k = k_first, buffer = 0; k < k_end; k += WORDS, buffer ^= 1) {
        float *tile_a = tiles + buffer * (TileA::LENGTH + TileB::LENGTH), *tile_b = tile_a + TileA::LENGTH;
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
                    float va_elems[4] = {va[i].x, va[i].y, va[i].z, va[i].w};
                    float vb_elems[4] = {vb[j].x, vb[j].y, vb[j].z, vb[j].w};
#pragma unroll
                    for (int r = 0; r < 4; r++)
#pragma unroll
                        for (int l = 0; l < 4; l++)
                            sums[i * 4 + r][j][l] = fmaf(va_elems[r], vb_elems[l], sums[i * 4 + r][j][l]);
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

// Either rows are contiguous (20 words each, so that a fragment's 32 words are in different banks), or words are (ROWS + 8 each,
// likewise).
template <int ROWS, bool ALONG_K, bool BF16> struct MmaTile {
    static const int STRIDE = ALONG_K ? WORDS + 4 : ROWS + 8, LENGTH = ALONG_K ? ROWS * STRIDE : WORDS * STRIDE;
    static const int GROUPS = ROWS * WORDS / 4 / 256, PER = BF16 ? 2 : 1;

    template <class F> __device__ static __forceinline__ void prepare(F &f, int first) {
        if constexpr (ALONG_K)
            for (int i = 0; i < GROUPS; i++) f.prepare(i, first + (threadIdx.x + i * 256) / 4);
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

// One block's tile on tensor cores: eight warps, two by four.
template <int ROWS, int COLUMNS, bool BF16, class A, class B>
__device__ __forceinline__ void matmul_mma(A a, B b, const Epilogue &result, int k_first, int k_end) {
    typedef MmaTile<ROWS, A::ALONG_K, BF16> TileA;
    typedef MmaTile<COLUMNS, B::ALONG_K, BF16> TileB;
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
    TileA::prepare(a, first_row);
    TileB::prepare(b, first_column);
    TileA::load(a, first_row, k_first, next_a);
    TileB::load(b, first_column, k_first, next_b);
    for (int k = k_first, buffer = 0; k < k_end; k += STEP, buffer ^= 1) {
        u32 *tile_a = tiles + buffer * (TileA::LENGTH + TileB::LENGTH), *tile_b = tile_a + TileA::LENGTH;
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
__device__ __forceinline__ void matmul(A a, B b, const Epilogue &result, int k_first, int k_end) {
    if constexpr (MATH == 0)
        matmul_f32<TILE, TILE>(a, b, result, k_first, k_end);
    else
        matmul_mma<TILE, TILE, MATH == 2>(a, b, result, k_first, k_end);
}

#define SLOTS(TILE) (TILE * WORDS / 4 / 256)

// Blocks (x: rows of the product, y: columns, z: parts of k, `k_part` elements each). X: type of x and dy.
#define KERNELS(MATH, TILE, NAME, X)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) conv_##NAME(PIXEL_PARAMS(X), const float *weights, EPILOGUE_PARAMS, int k_part) { \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        GatherK<SLOTS(TILE), X> a{x, taps, MAKE_PIXELS, m, k_end};                                                         \
        Matrix<F32In> b{{weights}, channels, k_end};                                                                    \
        matmul<MATH, TILE>(a, b, MAKE_EPILOGUE(m), k_first, k_end);                                                         \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        conv_transposed_##NAME(PIXEL_PARAMS(X), const float *weights, EPILOGUE_PARAMS, int k_part) {                                    \
        int m = n * rows * columns, k_first = blockIdx.z * k_part, k_end = min(tap_count * c, k_first + k_part);         \
        GatherK<SLOTS(TILE), X> a{x, taps, MAKE_PIXELS, m, k_end};                                                         \
        Transposed<SLOTS(TILE)> b{weights, taps, channels, c, k_end};                                                    \
        matmul<MATH, TILE>(a, b, MAKE_EPILOGUE(m), k_first, k_end);                                                         \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        conv_weight_grad_##NAME(PIXEL_PARAMS(X), X dy, Out dw, float *parts, int channels, int k_part) {                           \
        int m = tap_count * c, k_first = blockIdx.z * k_part, k_end = min(n * rows * columns, k_first + k_part);         \
        GatherM<X> a{x, taps, MAKE_PIXELS, m, k_end};                                                                      \
        Matrix<X> b{dy, channels, k_end};                                                                                \
        matmul<MATH, TILE>(a, b, weight_grad_epilogue(dw, parts, m, channels), k_first, k_end);                                   \
    }

#ifdef CONV_f32_64
KERNELS(0, 64, f32_64, F32In)
#endif
#ifdef CONV_f32_128
KERNELS(0, 128, f32_128, F32In)
#endif
#ifdef CONV_tf32_64
KERNELS(1, 64, tf32_64, F32In)
#endif
#ifdef CONV_tf32_128
KERNELS(1, 128, tf32_128, F32In)
#endif
#ifdef CONV_bf16_64
KERNELS(2, 64, bf16_64, In)
#endif
#ifdef CONV_bf16_128
KERNELS(2, 128, bf16_128, In)
#endif

#ifdef CONV_SPLIT_K_REDUCE
// Adds the parts of k in order and applies the epilogue.
extern "C" __global__ void conv_split_k_reduce(int count, int m, int rows, int columns, EPILOGUE_PARAMS) {
    Epilogue result = MAKE_EPILOGUE(m);
    for (int i = grid_thread(); i < m * channels; i += grid_size()) {
        float sum = 0.0f;
#pragma unroll 4
        for (int part = 0; part < count; part++) sum += parts[part * m * channels + i];
        int offset, image;
        result.row(i / channels, offset, image);
        y.set(offset + i % channels, result.add_addends(sum, offset, image, i % channels));
    }
}
#endif
