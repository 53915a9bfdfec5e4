// Kernels around cuDNN and cuBLASLt operations: transposing weight gradients, and adding to results.

// y [columns, rows] = x [rows, columns], transposed. Blocks of 32 x 8 threads for tiles of 32 x 32.
//
// Turns weight gradients [cout, taps, cin] into [taps, cin, cout].
extern "C" __global__ void transpose(In x, Out y, int rows, int columns) {
    __shared__ float tile[32][33];
    int first_row = blockIdx.y * 32, first_column = blockIdx.x * 32;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = first_row + i, column = first_column + threadIdx.x;
        if (row < rows && column < columns) tile[i][threadIdx.x] = x[row * columns + column];
    }
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = first_row + threadIdx.x, column = first_column + i;
        if (row < rows && column < columns) y.set(column * rows + row, tile[threadIdx.x][i]);
    }
}

// Adds V elements of `from` starting at i, if `there`.
template <int V> __device__ __forceinline__ void add_from(In from, int i, bool there, float (&v)[V]) {
    if (!there) return;
    float w[V];
    from.get<V>(i, w);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] += w[j];
}

template <int V>
__device__ __forceinline__ void library_epilogue_of(In x, In bias, In per_image_bias, In residual, Out y, int n, int image,
                                                    int c, int flags) {
    for (int i = grid_thread() * V; i < n; i += grid_size() * V) {
        float v[V];
        x.get<V>(i, v);
        add_from<V>(bias, i % c, flags & 1, v);
        add_from<V>(per_image_bias, i / image * c + i % c, flags & 2, v);
        add_from<V>(residual, i, flags & 4, v);
        y.set<V>(i, v);
    }
}

// y = x + bias [c] + per_image_bias [images, c] + residual, with one bit of `flags` for each; x [images, pixels, c] may alias y;
// `image` elements per image.
extern "C" __global__ void library_epilogue(In x, In bias, In per_image_bias, In residual, Out y, int n, int image, int c,
                                            int flags) {
    if (c % 8 == 0)
        library_epilogue_of<8>(x, bias, per_image_bias, residual, y, n, image, c, flags);
    else
        library_epilogue_of<1>(x, bias, per_image_bias, residual, y, n, image, c, flags);
}
