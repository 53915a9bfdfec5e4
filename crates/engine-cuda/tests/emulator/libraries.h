// The functions of cuDNN and cuBLASLt that the program calls, as in NVIDIA's headers, with enumerations as integers. Operations are
// computed by plain loops when the stream reaches them. Objects of the wrong type end the process.
//
// Of cuDNN's algorithms the first needs more memory than allowed, the second is not deterministic, the third is not supported; the
// fourth is the one to use, and overwrites its workspace.
//
// Environment: FAKE_CUDA_CUDNN, FAKE_CUDA_CUBLAS: versions (92100, 130000); FAKE_CUDA_FAIL also accepts "product".
#pragma once
#include "state.h"

namespace {

enum { NN_BAD_PARAM = 2000, NN_NOT_SUPPORTED = 3000, LT_INVALID_VALUE = 7, LT_NOT_SUPPORTED = 15, ALGORITHM = 1, WORKSPACE = 1000 };

struct Object {
    std::string kind;
    std::vector<long long> v;
};

struct Objects : Handles<Object> {
    Object *of(void *handle, const char *kind) const {
        Object *object = get(handle);
        if (object->kind != kind) die(std::string("a library expects ") + kind + ", got " + object->kind);
        return object;
    }
};

Objects &objects() {
    static Objects *all = new Objects{{"library object", {}}};
    return *all;
}

int make_object(void **out, const char *kind, std::vector<long long> v) {
    Lock lock;
    *out = objects().make({kind, v});
    return SUCCESS;
}

int set_object(void *handle, const char *kind, std::vector<long long> v) {
    Lock lock;
    objects().of(handle, kind)->v = v;
    return SUCCESS;
}

int destroy_object(void *handle, const char *kind) {
    Lock lock;
    objects().destroy(objects().of(handle, kind));
    return SUCCESS;
}

// f32 or bf16 elements in GPU memory.
struct Elements {
    char *at;
    bool bf16;

    double get(long long i) const {
        unsigned bits = bf16 ? (unsigned)((const unsigned short *)at)[i] << 16 : ((const unsigned *)at)[i];
        float v;
        memcpy(&v, &bits, 4);
        return v;
    }
    void set(long long i, double value) const {
        float v = (float)value;
        unsigned bits;
        memcpy(&bits, &v, 4);
        if (bf16)
            ((unsigned short *)at)[i] = v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        else
            ((unsigned *)at)[i] = bits;
    }
    void check_access(const Device *device, long long count, const char *what) const {
        if ((uint64_t)at % 16) die(std::string(what) + ": not aligned");
        check(device, (uint64_t)at, count * (bf16 ? 2 : 4), what);
    }
};

// ------------------------------------------------------------------------------------------------------------- cuDNN

// n, h, w, c of a tensor; k, h, w, c of weights: c is contiguous in both.
struct Shape4 {
    long long n, h, w, c;
    bool bf16;
    Elements elements;

    // Format and data type are in different order for tensors and weights.
    Shape4(void *handle, const char *kind, uint64_t at) {
        const std::vector<long long> &v = objects().of(handle, kind)->v;
        if (v.size() != 6) die(std::string(kind) + " without a size");
        bool weights = std::string(kind) == "weights";
        if (v[weights ? 1 : 0] != 1) die("not NHWC");
        long long format = v[weights ? 0 : 1];
        if (format != 0 && format != 9) die("neither f32 nor bf16");
        n = v[2], c = v[3], h = v[4], w = v[5];
        bf16 = format == 9;
        elements = {(char *)at, bf16};
    }
    long long count() const { return n * h * w * c; }
    long long index(long long n_, long long h_, long long w_, long long c_) const { return ((n_ * h + h_) * w + w_) * c + c_; }
};

enum ConvPass { PASS_FORWARD, PASS_DATA, PASS_WEIGHTS };

int convolve(ConvPass of, void *nn, const float *alpha, Shape4 x, Shape4 w, Shape4 y, void *convolution, int algorithm,
             uint64_t workspace, size_t bytes, const float *beta, Elements z, Elements bias) {
    Stream *stream = state().streams.get((void *)objects().of(nn, "cuDNN")->v.at(0));
    if (int error = usable(stream)) return error;
    if (failing("product")) return NN_NOT_SUPPORTED;
    std::vector<long long> g = objects().of(convolution, "a convolution")->v;
    if (g.size() != 9 || g[4] != 1 || g[5] != 1 || g[6] != 1 || g[7] != 0) die("not a cross-correlation with f32 accumulation");
    if (algorithm != ALGORITHM || bytes < WORKSPACE) die("an algorithm that was not offered, or too little workspace");
    if (x.bf16 != w.bf16 || x.bf16 != y.bf16) return NN_NOT_SUPPORTED;
    if (w.n != y.c || w.c != x.c || x.n != y.n) return NN_BAD_PARAM;
    // Rounding to tf32 must be requested explicitly.
    if (!x.bf16 && g[8] == 3) count("convolutions_in_f32");
    Device *device = stream->device;
    float a = *alpha, b = *beta;
    count(of == PASS_FORWARD ? "forward_convolutions" : of == PASS_DATA ? "data_gradients" : "weight_gradients");
    return enqueue(stream, [=] {
        x.elements.check_access(device, x.count(), "x");
        w.elements.check_access(device, w.count(), "w");
        y.elements.check_access(device, y.count(), "y");
        check(device, workspace, bytes, "a workspace");
        memset((void *)workspace, 0xff, bytes);
        const Shape4 &result = of == PASS_FORWARD ? y : of == PASS_DATA ? x : w;
        std::vector<double> sums(result.count());
        for (long long n = 0; n < y.n; n++)
            for (long long oy = 0; oy < y.h; oy++)
                for (long long ox = 0; ox < y.w; ox++)
                    for (long long ky = 0; ky < w.h; ky++)
                        for (long long kx = 0; kx < w.w; kx++) {
                            long long iy = oy * g[2] + ky - g[0], ix = ox * g[3] + kx - g[1];
                            if (iy < 0 || iy >= x.h || ix < 0 || ix >= x.w) continue;
                            for (long long co = 0; co < y.c; co++)
                                for (long long ci = 0; ci < x.c; ci++) {
                                    long long at_x = x.index(n, iy, ix, ci), at_w = w.index(co, ky, kx, ci), at_y = y.index(n, oy, ox, co);
                                    if (of == PASS_FORWARD) sums[at_y] += x.elements.get(at_x) * w.elements.get(at_w);
                                    if (of == PASS_DATA) sums[at_x] += y.elements.get(at_y) * w.elements.get(at_w);
                                    if (of == PASS_WEIGHTS) sums[at_w] += x.elements.get(at_x) * y.elements.get(at_y);
                                }
                        }
        for (long long i = 0; i < result.count(); i++) {
            double added = b == 0.0f ? 0.0 : b * z.get(i);
            result.elements.set(i, a * sums[i] + added + (bias.at ? bias.get(i % result.c) : 0.0));
        }
    });
}

struct Performance {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};

int algorithms(void *nn, int room, int *found, Performance *out, void *convolution) {
    Lock lock;
    objects().of(nn, "cuDNN");
    int math = objects().of(convolution, "a convolution")->v.at(8);
    const Performance all[] = {{0, 0, 1, (size_t)1 << 40, 1, math, {}}, {3, 0, 2, 0, 0, math, {}}, {4, NN_NOT_SUPPORTED, -1, 0, 1, math, {}},
                               {ALGORITHM, 0, 3, WORKSPACE, 1, math, {}}};
    *found = std::min(room, 4);
    memcpy(out, all, *found * sizeof *out);
    return SUCCESS;
}

} // namespace

#define LIBRARY_API(type) extern "C" __attribute__((visibility("default"))) type

LIBRARY_API(size_t) cudnnGetVersion() { return atoi(setting("CUDNN", "92100").c_str()); }
LIBRARY_API(const char *) cudnnGetErrorString(int error) {
    return error == NN_NOT_SUPPORTED ? "CUDNN_STATUS_NOT_SUPPORTED" : error == NN_BAD_PARAM ? "CUDNN_STATUS_BAD_PARAM" : "an error of the stand-in";
}
API cudnnCreate(void **out) {
    {
        Lock lock;
        if (int error = usable()) return error;
    }
    return make_object(out, "cuDNN", {0});
}
API cudnnDestroy(void *it) { return destroy_object(it, "cuDNN"); }
API cudnnSetStream(void *it, void *stream) { return set_object(it, "cuDNN", {(long long)stream}); }
API cudnnCreateTensorDescriptor(void **out) { return make_object(out, "a tensor", {}); }
API cudnnSetTensor4dDescriptor(void *it, int format, int type, int n, int c, int h, int w) {
    return set_object(it, "a tensor", {format, type, n, c, h, w});
}
API cudnnDestroyTensorDescriptor(void *it) { return destroy_object(it, "a tensor"); }
API cudnnCreateFilterDescriptor(void **out) { return make_object(out, "weights", {}); }
API cudnnSetFilter4dDescriptor(void *it, int type, int format, int k, int c, int h, int w) {
    return set_object(it, "weights", {type, format, k, c, h, w});
}
API cudnnDestroyFilterDescriptor(void *it) { return destroy_object(it, "weights"); }
API cudnnCreateConvolutionDescriptor(void **out) { return make_object(out, "a convolution", {}); }
API cudnnSetConvolution2dDescriptor(void *it, int ph, int pw, int u, int v, int dh, int dw, int mode, int type) {
    return set_object(it, "a convolution", {ph, pw, u, v, dh, dw, mode, type, 0});
}
API cudnnSetConvolutionMathType(void *it, int math) {
    Lock lock;
    objects().of(it, "a convolution")->v.at(8) = math;
    return SUCCESS;
}
API cudnnDestroyConvolutionDescriptor(void *it) { return destroy_object(it, "a convolution"); }
API cudnnCreateActivationDescriptor(void **out) { return make_object(out, "an activation", {}); }
API cudnnSetActivationDescriptor(void *it, int mode, int nan, double) { return set_object(it, "an activation", {mode, nan}); }
API cudnnDestroyActivationDescriptor(void *it) { return destroy_object(it, "an activation"); }

API cudnnGetConvolution2dForwardOutputDim(void *convolution, void *x_, void *w_, int *n, int *c, int *h, int *w) {
    Lock lock;
    Shape4 x(x_, "a tensor", 0), weights(w_, "weights", 0);
    const std::vector<long long> &g = objects().of(convolution, "a convolution")->v;
    *n = x.n, *c = weights.n;
    *h = (x.h + 2 * g[0] - weights.h) / g[2] + 1, *w = (x.w + 2 * g[1] - weights.w) / g[3] + 1;
    return SUCCESS;
}

API cudnnGetConvolutionForwardAlgorithmMaxCount(void *, int *out) { return *out = 8, SUCCESS; }
API cudnnGetConvolutionBackwardDataAlgorithmMaxCount(void *, int *out) { return *out = 6, SUCCESS; }
API cudnnGetConvolutionBackwardFilterAlgorithmMaxCount(void *, int *out) { return *out = 7, SUCCESS; }

API cudnnGetConvolutionForwardAlgorithm_v7(void *nn, void *x, void *w, void *g, void *y, int room, int *found, Performance *out) {
    Shape4(x, "a tensor", 0), Shape4(w, "weights", 0), Shape4(y, "a tensor", 0);
    return algorithms(nn, room, found, out, g);
}
API cudnnGetConvolutionBackwardDataAlgorithm_v7(void *nn, void *w, void *dy, void *g, void *dx, int room, int *found, Performance *out) {
    Shape4(w, "weights", 0), Shape4(dy, "a tensor", 0), Shape4(dx, "a tensor", 0);
    return algorithms(nn, room, found, out, g);
}
API cudnnGetConvolutionBackwardFilterAlgorithm_v7(void *nn, void *x, void *dy, void *g, void *dw, int room, int *found, Performance *out) {
    Shape4(x, "a tensor", 0), Shape4(dy, "a tensor", 0), Shape4(dw, "weights", 0);
    return algorithms(nn, room, found, out, g);
}

API cudnnConvolutionForward(void *nn, const float *alpha, void *x_, uint64_t x, void *w_, uint64_t w, void *g, int algorithm, uint64_t space,
                            size_t bytes, const float *beta, void *y_, uint64_t y) {
    Lock lock;
    Shape4 of_y(y_, "a tensor", y);
    return convolve(PASS_FORWARD, nn, alpha, Shape4(x_, "a tensor", x), Shape4(w_, "weights", w), of_y, g, algorithm, space, bytes, beta,
                    of_y.elements, {0, false});
}
API cudnnConvolutionBiasActivationForward(void *nn, const float *alpha, void *x_, uint64_t x, void *w_, uint64_t w, void *g, int algorithm,
                                          uint64_t space, size_t bytes, const float *beta, void *z_, uint64_t z, void *bias_, uint64_t bias,
                                          void *activation, void *y_, uint64_t y) {
    Lock lock;
    Shape4 of_bias(bias_, "a tensor", bias), of_y(y_, "a tensor", y), of_z(z_, "a tensor", z);
    if (objects().of(activation, "an activation")->v.at(0) != 5) die("an activation other than the identity");
    if (of_bias.count() != of_y.c || of_bias.c != of_y.c || of_z.count() != of_y.count() || of_bias.bf16 != of_y.bf16) return NN_BAD_PARAM;
    count("convolutions_with_a_bias");
    return convolve(PASS_FORWARD, nn, alpha, Shape4(x_, "a tensor", x), Shape4(w_, "weights", w), of_y, g, algorithm, space, bytes, beta,
                    of_z.elements, of_bias.elements);
}
API cudnnConvolutionBackwardData(void *nn, const float *alpha, void *w_, uint64_t w, void *dy_, uint64_t dy, void *g, int algorithm,
                                 uint64_t space, size_t bytes, const float *beta, void *dx_, uint64_t dx) {
    Lock lock;
    Shape4 of_dx(dx_, "a tensor", dx);
    return convolve(PASS_DATA, nn, alpha, of_dx, Shape4(w_, "weights", w), Shape4(dy_, "a tensor", dy), g, algorithm, space, bytes, beta,
                    of_dx.elements, {0, false});
}
API cudnnConvolutionBackwardFilter(void *nn, const float *alpha, void *x_, uint64_t x, void *dy_, uint64_t dy, void *g, int algorithm,
                                   uint64_t space, size_t bytes, const float *beta, void *dw_, uint64_t dw) {
    Lock lock;
    Shape4 of_dw(dw_, "weights", dw);
    return convolve(PASS_WEIGHTS, nn, alpha, Shape4(x_, "a tensor", x), of_dw, Shape4(dy_, "a tensor", dy), g, algorithm, space, bytes, beta,
                    of_dw.elements, {0, false});
}

// ---------------------------------------------------------------------------------------------------------- cuBLASLt

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

LIBRARY_API(size_t) cublasLtGetVersion() { return atoi(setting("CUBLAS", "130000").c_str()); }
LIBRARY_API(const char *) cublasLtGetStatusString(int) { return "CUBLAS_STATUS_NOT_SUPPORTED"; }
API cublasLtCreate(void **out) { return make_object(out, "cuBLASLt", {}); }
API cublasLtDestroy(void *it) { return destroy_object(it, "cuBLASLt"); }
// compute, scale, transposed a, transposed b, epilogue, bias
API cublasLtMatmulDescCreate(void **out, int compute, int scale) { return make_object(out, "a product", {compute, scale, 0, 0, 1, 0}); }
API cublasLtMatmulDescSetAttribute(void *it, int attribute, const void *value, size_t bytes) {
    Lock lock;
    const std::map<int, std::pair<int, size_t>> known = {{3, {2, 4}}, {4, {3, 4}}, {7, {4, 4}}, {8, {5, 8}}};
    auto at = known.find(attribute);
    if (at == known.end() || bytes != at->second.second) return LT_INVALID_VALUE;
    long long v = 0;
    memcpy(&v, value, bytes);
    objects().of(it, "a product")->v[at->second.first] = v;
    return SUCCESS;
}
API cublasLtMatmulDescDestroy(void *it) { return destroy_object(it, "a product"); }
API cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return make_object(out, "a matrix", {type, (long long)rows, (long long)columns, stride});
}
API cublasLtMatrixLayoutDestroy(void *it) { return destroy_object(it, "a matrix"); }
API cublasLtMatmulPreferenceCreate(void **out) { return make_object(out, "a preference", {0, 256, 256, 256, 256}); }
API cublasLtMatmulPreferenceSetAttribute(void *it, int attribute, const void *value, size_t bytes) {
    Lock lock;
    long long v = 0;
    if (attribute == 1 ? bytes != 8 : attribute < 5 || attribute > 8 || bytes != 4) return LT_INVALID_VALUE;
    memcpy(&v, value, bytes);
    objects().of(it, "a preference")->v[attribute == 1 ? 0 : attribute - 4] = v;
    return SUCCESS;
}
API cublasLtMatmulPreferenceDestroy(void *it) { return destroy_object(it, "a preference"); }

API cublasLtMatmulAlgoGetHeuristic(void *lt, void *product, void *a, void *b, void *c, void *d, void *preference, int room, Heuristic *out,
                                   int *found) {
    Lock lock;
    objects().of(lt, "cuBLASLt"), objects().of(product, "a product");
    for (void *matrix : {a, b, c, d}) objects().of(matrix, "a matrix");
    const std::vector<long long> &wanted = objects().of(preference, "a preference")->v;
    for (int i = 1; i < 5; i++)
        if (wanted[i] != 64) die("not the plan's alignment");
    *found = room > 0 && wanted[0] >= WORKSPACE;
    if (*found) out[0] = {{11, 12, 13, 14, 15, 16, 17, 18}, WORKSPACE, 0, 1.0f, {}};
    return SUCCESS;
}

API cublasLtMatmul(void *lt, void *product, const float *alpha, uint64_t a, void *a_, uint64_t b, void *b_, const float *beta, uint64_t c, void *c_,
                   uint64_t d, void *d_, const uint64_t *algorithm, uint64_t workspace, size_t bytes, void *stream_handle) {
    Lock lock;
    objects().of(lt, "cuBLASLt");
    Stream *stream = state().streams.get(stream_handle);
    if (int error = usable(stream)) return error;
    if (failing("product")) return LT_NOT_SUPPORTED;
    for (int i = 0; i < 8; i++)
        if (algorithm[i] != 11u + i || bytes < WORKSPACE) die("an algorithm that was not offered, or too little workspace");
    std::vector<long long> p = objects().of(product, "a product")->v;
    std::vector<long long> of_a = objects().of(a_, "a matrix")->v, of_b = objects().of(b_, "a matrix")->v;
    std::vector<long long> of_c = objects().of(c_, "a matrix")->v, of_d = objects().of(d_, "a matrix")->v;
    bool bf16 = of_a[0] == 14;
    if (of_a[0] != of_b[0] || of_c != of_d || (!bf16 && of_d[0] != 0) || p[1] != 0 || (p[0] != 68 && p[0] != 77)) return LT_NOT_SUPPORTED;
    long long m = of_d[1], n = of_d[2], k = p[2] ? of_a[1] : of_a[2];
    if ((p[2] ? of_a[2] : of_a[1]) != m || (p[3] ? of_b[2] : of_b[1]) != k || (p[3] ? of_b[1] : of_b[2]) != n) return LT_INVALID_VALUE;
    if (of_a[3] < of_a[1] || of_b[3] < of_b[1] || of_d[3] < m) return LT_INVALID_VALUE;
    count(p[4] == 4 ? "matrix_products_with_a_bias" : "matrix_products");
    if (p[0] == 77) count("matrix_products_in_tf32");
    bool bf16_result = of_d[0] == 14;
    Elements in_a{(char *)a, bf16}, in_b{(char *)b, bf16}, in_c{(char *)c, bf16_result}, in_d{(char *)d, bf16_result};
    Elements bias{(char *)(p[4] == 4 ? p[5] : 0), bf16_result};
    Device *device = stream->device;
    float by = *alpha, of_added = *beta;
    return enqueue(stream, [=] {
        in_a.check_access(device, of_a[1] * of_a[2], "a");
        in_b.check_access(device, of_b[1] * of_b[2], "b");
        in_c.check_access(device, m * n, "c");
        in_d.check_access(device, m * n, "d");
        if (bias.at) bias.check_access(device, m, "a bias");
        check(device, workspace, bytes, "a workspace");
        memset((void *)workspace, 0xff, bytes);
        for (long long j = 0; j < n; j++)
            for (long long i = 0; i < m; i++) {
                double sum = 0;
                for (long long l = 0; l < k; l++)
                    sum += in_a.get(p[2] ? i * of_a[3] + l : l * of_a[3] + i) * in_b.get(p[3] ? l * of_b[3] + j : j * of_b[3] + l);
                double added = of_added == 0.0f ? 0.0 : of_added * in_c.get(j * of_c[3] + i);
                in_d.set(j * of_d[3] + i, by * sum + added + (bias.at ? bias.get(i) : 0.0));
            }
    });
}
