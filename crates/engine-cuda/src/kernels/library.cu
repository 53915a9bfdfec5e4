// What stands behind the products of cuDNN and cuBLASLt: the order of weight gradients, and what is added to results.

// y [columns, rows] = x [rows, columns], transposed. Blocks of 32 x 8 threads for tiles of 32 x 32.
//
// Gradients of weights [cout, taps, cin] are [taps, cin, cout] so.
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

// V numbers of `from`, from i on, added where `there`.
template <int V> __device__ __forceinline__ void add_from(In from, int i, bool there, float (&v)[V]) {
    if (!there) return;
    float w[V];
    from.get<V>(i, w);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] += w[j];
}

template <int V>
__device__ __forceinline__ void product_epilogue_of(In x, In bias, In per_image_bias, In residual, Out y, int n, int image,
                                                    int c, int flags) {
    for (int i = thread_of_grid() * V; i < n; i += threads_of_grid() * V) {
        float v[V];
        x.get<V>(i, v);
        add_from<V>(bias, i % c, flags & 1, v);
        add_from<V>(per_image_bias, i / image * c + i % c, flags & 2, v);
        add_from<V>(residual, i, flags & 4, v);
        y.set<V>(i, v);
    }
}

// y = x + bias [c] + per_image_bias [images, c] + residual, of which `flags` has a bit each; x [images, pixels, c] may be y,
// with `image` numbers an image.
extern "C" __global__ void product_epilogue(In x, In bias, In per_image_bias, In residual, Out y, int n, int image, int c,
                                            int flags) {
    if (c % 8 == 0)
        product_epilogue_of<8>(x, bias, per_image_bias, residual, y, n, image, c, flags);
    else
        product_epilogue_of<1>(x, bias, per_image_bias, residual, y, n, image, c, flags);
}
