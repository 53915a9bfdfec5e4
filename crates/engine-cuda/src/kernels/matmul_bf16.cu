// Tiles of bf16 matrix products (conv_bf16.cu, attention_wide.cu): shared memory layout, fragments, pipeline stages. Template
// parameters determine what is copied and where results go.
#ifndef MATMUL_BF16_CU
#define MATMUL_BF16_CU

// Elements per step along k, and per 16-byte chunk.
#define DEPTH 32
#define CHUNK 8

// An operand tile of ROWS rows in shared memory, [row][k] or [k][row], in chunks of 16 bytes. Chunks of a row are swizzled so that
// the eight rows of a matrix are in different banks.
template <int ROWS> struct AlongK {
    static const int PER_ROW = DEPTH / CHUNK, CHUNKS = ROWS * PER_ROW;

    __device__ static __forceinline__ int swizzle(int row, int chunk) { return row * PER_ROW + (chunk ^ (row >> 1 & 3)); }
};

template <int ROWS> struct AlongRows {
    static const int PER_ROW = ROWS / CHUNK, CHUNKS = DEPTH * PER_ROW;

    __device__ static __forceinline__ int swizzle(int k, int chunk) { return k * PER_ROW + (chunk ^ (k & 7)); }
};

// How a block divides SIDE x SIDE results among its warps.
template <int SIDE> struct BlockTile {
    // 128: 2 x 4 warps of 64 x 32 elements; 64: 2 x 2 of 32 x 32.
    static const int BLOCK = SIDE == 128 ? 256 : 128, STAGES = SIDE == 128 ? 3 : 4;
    static const int WARP_ROWS = SIDE / 2, WARP_COLUMNS = 32, COLUMN_WARPS = SIDE / 32;
    static const int RT = WARP_ROWS / 16, CT = WARP_COLUMNS / 8;
    static const int PER_THREAD = SIDE * DEPTH / CHUNK / BLOCK;
};

// A warp's fragments from rows `row ..` of a tile, elements k .. k + 16: the A fragment of 16 rows, or the B fragments of 16
// columns (two pairs of words).
template <int ROWS> __device__ __forceinline__ void a_fragment(AlongK<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices(to, tile + AlongK<ROWS>::swizzle(row + lane % 16, k / CHUNK + lane / 16));
}

template <int ROWS> __device__ __forceinline__ void a_fragment(AlongRows<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(to, tile + AlongRows<ROWS>::swizzle(k + lane % 8 + lane / 16 * 8, row / CHUNK + lane / 8 % 2));
}

template <int ROWS> __device__ __forceinline__ void b_fragment(AlongK<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices(to, tile + AlongK<ROWS>::swizzle(row + lane % 8 + lane / 16 * 8, k / CHUNK + lane / 8 % 2));
}

template <int ROWS> __device__ __forceinline__ void b_fragment(AlongRows<ROWS>, const uint4 *tile, int row, int k, u32 (&to)[4]) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(to, tile + AlongRows<ROWS>::swizzle(k + lane % 16, row / CHUNK + lane / 16));
}

// One block's tile, pipelined: the next stages are copied while the current one is multiplied.
template <int SIDE, class A, class B, class R>
__device__ __forceinline__ void matmul_bf16(A a, B b, const R &result, int steps) {
    typedef BlockTile<SIDE> T;
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
        const uint4 *tile_a = memory + step % T::STAGES * STAGE, *tile_b = tile_a + LayoutA::CHUNKS;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            u32 fa[T::RT][4], fb[T::CT / 2][4];
#pragma unroll
            for (int i = 0; i < T::RT; i++) a_fragment(LayoutA(), tile_a, warp_row + i * 16, k, fa[i]);
#pragma unroll
            for (int j = 0; j < T::CT / 2; j++) b_fragment(LayoutB(), tile_b, warp_column + j * 16, k, fb[j]);
#pragma unroll
            for (int i = 0; i < T::RT; i++)
#pragma unroll
                for (int j = 0; j < T::CT; j++) {
                    u32 words[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(sums[i][j], fa[i], words);
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
#endif
