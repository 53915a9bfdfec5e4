// CUDA C++ as C++ for the CPU: as much of it as the kernels of this crate need. A block's threads are fibers on one host thread,
// which switch where threads wait for each other.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#define DDPM_EMULATOR
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ inline
#define __shared__ static
#define __launch_bounds__(n)

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct dim3 {
    unsigned x, y, z;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Blocks run one after another.
inline unsigned atomicAdd(unsigned *at, unsigned v) {
    unsigned before = *at;
    *at += v;
    return before;
}
inline void __threadfence() {}
inline float __ldcg(const float *p) { return *p; }
inline double __ldcg(const double *p) { return *p; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void wait_for_warp();
uint64_t exchange(uint64_t mine, int lane_of_other);

template <class T> T __shfl_xor_sync(unsigned, T v, int other) {
    static_assert(sizeof(T) <= 8, "one or two words");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    unsigned linear = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    bits = exchange(bits, (linear % 32) ^ other);
    memcpy(&v, &bits, sizeof v);
    return v;
}
