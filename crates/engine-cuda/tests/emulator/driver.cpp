// A stand-in for NVIDIA's driver and NVRTC: one library that has the functions which cudarc calls, with the kernels run by
// the emulated GPU. What a GPU does by itself (kernels, copies from pinned memory, stream-ordered frees) is put off for as
// long as CUDA allows, until somebody waits for it, so that a missing wait gives wrong numbers. What no program may do
// (use what was freed or destroyed, free twice, pass wild pointers) ends the process with a message. What a driver
// answers to is answered as the driver does.
//
// Set by the environment: FAKE_CUDA_
//   DEVICES     how many GPUs (1)
//   CAPABILITY  of each, "9.0"
//   MEMORY      KiB of each that are free (4 GiB), of 8 GiB
//   POOLS       0: no memory pools, hence no cuMemAllocAsync
//   DRIVER      the newest CUDA that the driver takes (13000)
//   NVRTC       version (12090)
//   TARGETS     compute capabilities that NVRTC knows ("80 86 89 90")
//   BROKEN      a word in the names of sources that NVRTC finds an error in
//   FAIL        what fails with which CUresult: "launch:120:719 alloc:1:2", that is the 120th kernel; also sync, graph,
//               pinned, module, init, retain. After launch or sync the GPU is lost.
//   ORDER       "backwards": threads of a block run from the last on
//   REPORT      a file, for counts and for what was not given back when the process ends
#include "machine.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
};

std::string setting(const char *name, const char *otherwise) {
    const char *value = getenv((std::string("FAKE_CUDA_") + name).c_str());
    return value ? value : otherwise;
}

typedef std::function<void()> Work;

struct Block {
    size_t len;
    bool freed;
};

struct Device {
    int holders = 0; // of its primary context
    int lost = 0;    // the error that everything gives from now on
    size_t free = 0;
    size_t pooled = 0; // freed in a stream's order; given back when somebody waits
    std::map<uint64_t, Block> blocks;
};

struct Pinned {
    size_t len;
    int copies; // that are still to be made from it or to it
};

struct Graph {
    std::vector<Work> nodes;
};

struct GraphExec {
    Device *device;
    std::vector<Work> nodes;
};

struct Stream {
    Device *device;
    std::deque<Work> queue;
    uint64_t issued = 0, done = 0;
    Graph *capture = 0;
    bool invalid = false;
    std::thread::id capturer;
};

struct Event {
    Stream *stream = 0; // null: nothing is to be waited for
    uint64_t at = 0;
};

struct Module;

struct Function {
    Module *module;
    const Kernel *kernel;
};

struct Module {
    std::string source;
    std::vector<Function *> functions;
};

struct Program {
    std::string source, name, log, code;
};

struct Source {
    const char *name;
    uint64_t hash;
    std::vector<std::string> kernels;
};

const std::vector<Source> &sources() {
    static const std::vector<Source> *all = new std::vector<Source>{
#include "sources.h"
    };
    return *all;
}

// Things that a program holds by their addresses.
template <class T> struct Handles {
    const char *what;
    std::set<T *> there;

    T *make(const T &t) {
        T *made = new T(t);
        there.insert(made);
        return made;
    }
    T *get(void *handle) const {
        T *t = (T *)handle;
        if (!there.count(t)) die(std::string("no such ") + what + ", or it was destroyed");
        return t;
    }
    void destroy(T *t) {
        there.erase(t);
        delete t;
    }
};

// Never destroyed: the process ends in an order of its own.
struct State {
    std::mutex mutex;
    bool begun = false;
    std::vector<Device> devices;
    std::map<uint64_t, Pinned> pinned;
    Handles<Stream> streams{"stream", {}};
    Handles<Event> events{"event", {}};
    Handles<Module> modules{"module", {}};
    Handles<Function> functions{"function", {}};
    Handles<Graph> graphs{"graph", {}};
    Handles<GraphExec> execs{"graph that can be launched", {}};
    Handles<Program> programs{"program", {}};
    std::map<std::string, int> calls, counts;
};

State &state() {
    static State *all = new State;
    return *all;
}

struct Lock {
    std::lock_guard<std::mutex> guard{state().mutex};
};

thread_local Device *current = 0;

void count(const char *what) { state().counts[what]++; }

// The error that this call of its kind is to give.
int failing(const std::string &what) {
    int call = ++state().calls[what], at, error;
    std::istringstream all(setting("FAIL", ""));
    for (std::string one; all >> one;)
        if (one.rfind(what + ":", 0) == 0 && sscanf(one.c_str() + what.size(), ":%d:%d", &at, &error) == 2 && at == call)
            return error;
    return SUCCESS;
}

// What every call within a context begins with.
int usable() {
    if (!state().begun) return NOT_INITIALIZED;
    if (!current) return INVALID_CONTEXT;
    if (!current->holders) return CONTEXT_IS_DESTROYED;
    return current->lost;
}

int usable(const Stream *stream) {
    int error = usable();
    return !error && stream->device != current ? (int)INVALID_CONTEXT : error;
}

// A call that a stream which is captured cannot take: the capture is void.
int capturing(Stream *stream) {
    if (!stream->capture) return SUCCESS;
    stream->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

// Calls that act on the whole context, on the thread that captures.
int captured_here() {
    for (Stream *s : state().streams.there)
        if (s->capture && s->capturer == std::this_thread::get_id()) return capturing(s);
    return SUCCESS;
}

int enqueue(Stream *stream, Work work) {
    if (stream->capture) {
        if (stream->invalid) return CAPTURE_INVALIDATED;
        stream->capture->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    stream->queue.push_back(std::move(work));
    stream->issued++;
    int &most = state().counts["most_pending"];
    most = std::max(most, (int)stream->queue.size());
    return SUCCESS;
}

void drain(Stream *stream, uint64_t upto) {
    while (stream->done < upto) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        if (!stream->device->lost) work();
    }
}

int wait_for(Stream *stream, uint64_t upto) {
    drain(stream, upto);
    Device *device = stream->device;
    if (int error = failing("sync")) device->lost = device->lost ? device->lost : error;
    device->free += device->pooled;
    device->pooled = 0;
    return device->lost;
}

bool inside(const Device *device, uint64_t at, size_t len) {
    auto block = device->blocks.upper_bound(at);
    if (block == device->blocks.begin()) return false;
    --block;
    return !block->second.freed && at < block->first + block->second.len && len <= block->first + block->second.len - at;
}

void check(const Device *device, uint64_t at, size_t len, const std::string &what) {
    if (!inside(device, at, len)) die(what + ": no memory of the GPU, or it was freed");
}

Pinned *pinned_at(const void *at, size_t len) {
    auto &all = state().pinned;
    auto block = all.upper_bound((uint64_t)at);
    if (block == all.begin()) return 0;
    --block;
    uint64_t end = block->first + block->second.len;
    return (uint64_t)at < end && len <= end - (uint64_t)at ? &block->second : 0;
}

int allocate(Device *device, uint64_t *out, size_t len) {
    if (int error = captured_here()) return error;
    if (int error = failing("alloc")) return error;
    if (len == 0) return INVALID_VALUE;
    if (len > device->free + device->pooled) return OUT_OF_MEMORY;
    size_t reused = std::min(len, device->pooled);
    device->pooled -= reused;
    device->free -= len - reused;
    char *memory = map_memory(len);
    memset(memory, 0xcd, len);
    *out = (uint64_t)memory;
    device->blocks[*out] = {len, false};
    return SUCCESS;
}

void begin_free(Device *device, uint64_t at) {
    auto block = device->blocks.find(at);
    if (block == device->blocks.end() || block->second.freed) die("memory of the GPU is freed twice, or is none");
    block->second.freed = true;
}

void end_free(Device *device, uint64_t at, size_t &to) {
    size_t page = sysconf(_SC_PAGESIZE), len = device->blocks[at].len;
    void *first = (void *)(at / page * page);
    // The addresses are not given to others.
    madvise(first, at % page + len, MADV_DONTNEED);
    mprotect(first, at % page + len, PROT_NONE);
    to += len;
}

} // namespace

// ------------------------------------------------------------------------------------------------- errors and devices

API cuGetErrorName(int error, const char **out) {
    static const std::map<int, const char *> names = {
        {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}};
    auto name = names.find(error);
    *out = name == names.end() ? "CUDA_ERROR" : name->second;
    return SUCCESS;
}

API cuGetErrorString(int error, const char **out) {
    static const std::map<int, const char *> texts = {{2, "out of memory"},
                                                      {100, "no CUDA-capable device is detected"},
                                                      {214, "uncorrectable ECC error encountered"},
                                                      {700, "an illegal memory access was encountered"},
                                                      {719, "unspecified launch failure"}};
    auto text = texts.find(error);
    *out = text == texts.end() ? "an error of the stand-in" : text->second;
    return SUCCESS;
}

API cuInit(unsigned) {
    Lock lock;
    if (int error = failing("init")) return error;
    int devices = atoi(setting("DEVICES", "1").c_str());
    if (devices == 0) return NO_DEVICE;
    if (!state().begun) {
        start_machine(setting("ORDER", "") == "backwards");
        state().devices.resize(devices);
        for (Device &d : state().devices) d.free = strtoull(setting("MEMORY", "4194304").c_str(), 0, 10) << 10;
        state().begun = true;
    }
    return SUCCESS;
}

API cuDriverGetVersion(int *out) {
    *out = atoi(setting("DRIVER", "13000").c_str());
    return SUCCESS;
}

API cuDeviceGetCount(int *out) {
    Lock lock;
    if (!state().begun) return NOT_INITIALIZED;
    *out = state().devices.size();
    return SUCCESS;
}

API cuDeviceGet(int *out, int index) {
    Lock lock;
    if (!state().begun) return NOT_INITIALIZED;
    if (index < 0 || (size_t)index >= state().devices.size()) return INVALID_DEVICE;
    *out = index;
    return SUCCESS;
}

API cuDeviceGetName(char *out, int len, int device) {
    snprintf(out, len, "Stand-in GPU %d", device);
    return SUCCESS;
}

API cuDeviceGetAttribute(int *out, int attribute, int) {
    Lock lock;
    if (!state().begun) return NOT_INITIALIZED;
    int major = 0, minor = 0;
    sscanf(setting("CAPABILITY", "9.0").c_str(), "%d.%d", &major, &minor);
    switch (attribute) {
    case 75: *out = major; break;
    case 76: *out = minor; break;
    case 115: *out = setting("POOLS", "1") != "0"; break;
    default: die("an attribute of a GPU that the stand-in does not know: " + std::to_string(attribute));
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void **out, int device) {
    Lock lock;
    if (!state().begun) return NOT_INITIALIZED;
    if (int error = failing("retain")) return error;
    Device &d = state().devices.at(device);
    if (d.lost) return d.lost;
    d.holders++;
    *out = &d;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock;
    Device &d = state().devices.at(device);
    if (d.holders == 0) die("a context is released twice");
    d.holders--;
    return d.lost;
}

API cuCtxGetCurrent(void **out) {
    *out = current;
    return SUCCESS;
}

API cuCtxSetCurrent(void *context) {
    current = (Device *)context;
    return SUCCESS;
}

API cuCtxSynchronize() {
    Lock lock;
    if (int error = usable()) return error;
    if (int error = captured_here()) return error;
    int error = current->lost;
    for (Stream *s : state().streams.there)
        if (s->device == current) error = wait_for(s, s->issued);
    return error;
}

// -------------------------------------------------------------------------------------------------- streams and events

API cuStreamCreate(Stream **out, unsigned) {
    Lock lock;
    if (int error = usable()) return error;
    Stream stream;
    stream.device = current;
    *out = state().streams.make(stream);
    return SUCCESS;
}

API cuStreamDestroy_v2(void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    int error = usable(stream);
    // What is under way is still done.
    drain(stream, stream->issued);
    for (Event *e : state().events.there)
        if (e->stream == stream) e->stream = 0;
    state().streams.destroy(stream);
    return error;
}

API cuStreamSynchronize(void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (int error = capturing(stream)) return error;
    return wait_for(stream, stream->issued);
}

API cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    Event *event = state().events.get(event_handle);
    if (int error = usable(stream)) return error;
    if (!event->stream || event->stream->done >= event->at) return SUCCESS;
    if (int error = capturing(stream)) return error;
    Stream *other = event->stream;
    uint64_t at = event->at;
    return enqueue(stream, [=] {
        if (state().streams.there.count(other)) drain(other, at);
    });
}

API cuEventCreate(Event **out, unsigned) {
    Lock lock;
    if (int error = usable()) return error;
    *out = state().events.make(Event());
    return SUCCESS;
}

API cuEventDestroy_v2(void *handle) {
    Lock lock;
    state().events.destroy(state().events.get(handle));
    return usable();
}

API cuEventRecord(void *handle, void *stream_handle) {
    Lock lock;
    Event *event = state().events.get(handle);
    Stream *stream = state().streams.get(stream_handle);
    if (int error = usable(stream)) return error;
    if (int error = capturing(stream)) return error;
    event->stream = stream;
    event->at = stream->issued;
    return SUCCESS;
}

API cuEventSynchronize(void *handle) {
    Lock lock;
    Event *event = state().events.get(handle);
    if (int error = usable()) return error;
    return event->stream ? wait_for(event->stream, event->at) : (int)SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------- memory

API cuMemGetInfo_v2(size_t *free, size_t *total) {
    Lock lock;
    if (int error = usable()) return error;
    *free = current->free;
    *total = (size_t)8192 << 20;
    return SUCCESS;
}

API cuMemAlloc_v2(uint64_t *out, size_t len) {
    Lock lock;
    if (int error = usable()) return error;
    return allocate(current, out, len);
}

API cuMemAllocAsync(uint64_t *out, size_t len, void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (setting("POOLS", "1") == "0") return 801;
    return allocate(stream->device, out, len);
}

API cuMemFree_v2(uint64_t at) {
    Lock lock;
    if (int error = usable()) return error;
    if (int error = captured_here()) return error;
    begin_free(current, at);
    for (Stream *s : state().streams.there)
        if (s->device == current) drain(s, s->issued);
    end_free(current, at, current->free);
    return current->lost;
}

API cuMemFreeAsync(uint64_t at, void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    Device *device = stream->device;
    begin_free(device, at);
    if (int error = usable(stream)) return error;
    if (int error = capturing(stream)) return error;
    return enqueue(stream, [=] { end_free(device, at, device->pooled); });
}

API cuMemHostAlloc(void **out, size_t len, unsigned) {
    Lock lock;
    if (int error = usable()) return error;
    if (int error = captured_here()) return error;
    if (int error = failing("pinned")) return error;
    *out = aligned_alloc(4096, (len + 4095) / 4096 * 4096);
    memset(*out, 0xcd, len);
    state().pinned[(uint64_t)*out] = {len, 0};
    return SUCCESS;
}

API cuMemFreeHost(void *at) {
    Lock lock;
    auto block = state().pinned.find((uint64_t)at);
    if (block == state().pinned.end()) die("pinned memory is freed twice, or is none");
    int error = usable();
    if (!error && block->second.copies) die("pinned memory is freed while a copy from it is under way");
    state().pinned.erase(block);
    free(at);
    return error;
}

API cuMemsetD8Async(uint64_t at, unsigned char value, size_t len, void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    check(stream->device, at, len, "memset");
    return enqueue(stream, [=] { memset((void *)at, value, len); });
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t len, void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (stream->capture) die("a copy from the host while a stream is captured");
    check(stream->device, to, len, "a copy to the GPU");
    if (Pinned *pinned = pinned_at(from, len)) {
        count("pinned_copies");
        pinned->copies++;
        return enqueue(stream, [=] {
            memcpy((void *)to, from, len);
            pinned->copies--;
        });
    }
    count("staged_copies");
    std::vector<char> staged((const char *)from, (const char *)from + len);
    return enqueue(stream, [=] { memcpy((void *)to, staged.data(), len); });
}

API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t len, void *handle) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (stream->capture) die("a copy to the host while a stream is captured");
    check(stream->device, from, len, "a copy from the GPU");
    if (Pinned *pinned = pinned_at(to, len)) {
        pinned->copies++;
        return enqueue(stream, [=] {
            memcpy(to, (void *)from, len);
            pinned->copies--;
        });
    }
    drain(stream, stream->issued);
    if (!stream->device->lost) memcpy(to, (void *)from, len);
    return stream->device->lost;
}

// ---------------------------------------------------------------------------------------------------------------- kernels

API cuModuleLoadData(Module **out, const void *image) {
    Lock lock;
    if (int error = usable()) return error;
    if (int error = captured_here()) return error;
    if (int error = failing("module")) return error;
    int target = 0, toolkit = 0, major = 0, minor = 0, name = 0;
    if (sscanf((const char *)image, "stand-in's machine code for sm_%d by %d: %n", &target, &toolkit, &name) != 2 || !name)
        return INVALID_IMAGE;
    sscanf(setting("CAPABILITY", "9.0").c_str(), "%d.%d", &major, &minor);
    if (toolkit / 1000 > atoi(setting("DRIVER", "13000").c_str()) / 1000) return INVALID_IMAGE;
    if (target / 10 != major || target % 10 > minor) return NO_BINARY_FOR_GPU;
    *out = state().modules.make({(const char *)image + name, {}});
    return SUCCESS;
}

API cuModuleUnload(void *handle) {
    Lock lock;
    Module *module = state().modules.get(handle);
    for (Function *f : module->functions) state().functions.destroy(f);
    state().modules.destroy(module);
    return usable();
}

API cuModuleGetFunction(Function **out, void *handle, const char *name) {
    Lock lock;
    Module *module = state().modules.get(handle);
    if (int error = usable()) return error;
    for (const Source &source : sources()) {
        auto &kernels = source.kernels;
        if (module->source != source.name || std::find(kernels.begin(), kernels.end(), name) == kernels.end()) continue;
        *out = state().functions.make({module, find_kernel(name)});
        module->functions.push_back(*out);
        return SUCCESS;
    }
    return NOT_FOUND;
}

API cuLaunchKernel(void *function_handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *handle, void **parameters, void **extra) {
    Lock lock;
    Function *function = state().functions.get(function_handle);
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    const Kernel *kernel = function->kernel;
    struct {
        unsigned grid[3], block[3];
    } size = {{gx, gy, gz}, {bx, by, bz}};
    if (!can_launch(size.grid, size.block) || shared != 0 || extra != 0) return INVALID_VALUE;
    // As the driver, by the kernel's signature: how many there are is not told.
    std::vector<Argument> args;
    for (char kind : kernel->kinds) {
        Argument arg = {kind, 0};
        memcpy(&arg.bits, parameters[args.size()], kind == 'p' ? 8 : 4);
        args.push_back(arg);
    }
    Device *device = stream->device;
    Module *module = function->module;
    auto look = [=] {
        for (const Argument &arg : args)
            if (arg.kind == 'p') check(device, arg.bits, 1, std::string("a pointer for ") + kernel->name);
    };
    look();
    return enqueue(stream, [=] {
        count("launches");
        if ((device->lost = failing("launch"))) return;
        if (!state().modules.there.count(module)) die(std::string("the module of ") + kernel->name + " was unloaded");
        look();
        run_kernel(*kernel, size.grid, size.block, args.data());
    });
}

API cuStreamBeginCapture_v2(void *handle, int) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (stream->capture) return ILLEGAL_STATE;
    stream->capture = state().graphs.make(Graph());
    stream->invalid = false;
    stream->capturer = std::this_thread::get_id();
    return SUCCESS;
}

API cuStreamEndCapture(void *handle, Graph **out) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    *out = 0;
    if (int error = usable(stream)) return error;
    if (!stream->capture) return ILLEGAL_STATE;
    if (stream->capturer != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    Graph *graph = stream->capture;
    stream->capture = 0;
    if (stream->invalid) {
        state().graphs.destroy(graph);
        return CAPTURE_INVALIDATED;
    }
    count("captures");
    *out = graph;
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(GraphExec **out, void *handle, unsigned long long) {
    Lock lock;
    Graph *graph = state().graphs.get(handle);
    if (int error = usable()) return error;
    if (int error = failing("graph")) return error;
    *out = state().execs.make({current, graph->nodes});
    return SUCCESS;
}

API cuGraphDestroy(void *handle) {
    Lock lock;
    state().graphs.destroy(state().graphs.get(handle));
    return usable();
}

API cuGraphExecDestroy(void *handle) {
    Lock lock;
    state().execs.destroy(state().execs.get(handle));
    return usable();
}

API cuGraphLaunch(void *handle, void *stream_handle) {
    Lock lock;
    GraphExec *exec = state().execs.get(handle);
    Stream *stream = state().streams.get(stream_handle);
    if (int error = usable(stream)) return error;
    count("graph_launches");
    for (const Work &node : exec->nodes)
        if (int error = enqueue(stream, [=] {
                if (!stream->device->lost) node();
            }))
            return error;
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------------ NVRTC

namespace {

enum { NVRTC_INVALID_OPTION = 5, NVRTC_COMPILATION = 6 };

uint64_t hash(const std::string &text) {
    uint64_t h = 0xcbf29ce484222325ull;
    for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
    return h;
}

} // namespace

API nvrtcVersion(int *major, int *minor) {
    int version = atoi(setting("NVRTC", "12090").c_str());
    *major = version / 1000;
    *minor = version % 1000 / 10;
    return SUCCESS;
}

API nvrtcCreateProgram(Program **out, const char *source, const char *name, int, const char *const *, const char *const *) {
    Lock lock;
    *out = state().programs.make({source, name, "", ""});
    return SUCCESS;
}

API nvrtcDestroyProgram(Program **handle) {
    Lock lock;
    state().programs.destroy(state().programs.get(*handle));
    return SUCCESS;
}

API nvrtcCompileProgram(void *handle, int count_of_options, const char *const *options) {
    Lock lock;
    Program *program = state().programs.get(handle);
    std::string target;
    for (int i = 0; i < count_of_options; i++) {
        std::string option = options[i], architecture = "--gpu-architecture=sm_";
        if (option.rfind(architecture, 0) == 0) target = option.substr(architecture.size());
    }
    std::istringstream known(setting("TARGETS", "80 86 89 90"));
    bool has = false;
    for (std::string one; known >> one;) has |= one == target;
    if (!has) {
        program->log = "error: invalid value for --gpu-architecture (-arch)";
        return NVRTC_INVALID_OPTION;
    }
    std::string broken = setting("BROKEN", "");
    bool same = false;
    for (const Source &source : sources())
        same |= program->name == source.name && hash(program->source) == source.hash;
    if (!same || (!broken.empty() && program->name.find(broken) != std::string::npos)) {
        program->log = program->name + "(1): error: an identifier is undefined";
        return NVRTC_COMPILATION;
    }
    program->code =
        "stand-in's machine code for sm_" + target + " by " + setting("NVRTC", "12090") + ": " + program->name + '\0';
    count("compiled");
    return SUCCESS;
}

API nvrtcGetProgramLogSize(void *handle, size_t *out) {
    Lock lock;
    *out = state().programs.get(handle)->log.size() + 1;
    return SUCCESS;
}

API nvrtcGetProgramLog(void *handle, char *out) {
    Lock lock;
    strcpy(out, state().programs.get(handle)->log.c_str());
    return SUCCESS;
}

API nvrtcGetCUBINSize(void *handle, size_t *out) {
    Lock lock;
    *out = state().programs.get(handle)->code.size();
    return SUCCESS;
}

API nvrtcGetCUBIN(void *handle, char *out) {
    Lock lock;
    const std::string &code = state().programs.get(handle)->code;
    memcpy(out, code.data(), code.size());
    return SUCCESS;
}

// ----------------------------------------------------------------------------------------------------------------- report

__attribute__((destructor)) static void report() {
    std::string path = setting("REPORT", "");
    FILE *file = path.empty() ? 0 : fopen(path.c_str(), "w");
    if (!file) return;
    State &s = state();
    for (auto &[what, n] : s.counts) fprintf(file, "%s %d\n", what.c_str(), n);
    size_t holders = 0, blocks = 0;
    for (Device &d : s.devices) {
        holders += d.holders;
        for (auto &block : d.blocks) blocks += !block.second.freed;
    }
    for (auto [what, n] : std::initializer_list<std::pair<const char *, size_t>>{{"contexts", holders},
                                                                                {"memory", blocks},
                                                                                {"pinned", s.pinned.size()},
                                                                                {"streams", s.streams.there.size()},
                                                                                {"events", s.events.there.size()},
                                                                                {"modules", s.modules.there.size()},
                                                                                {"graphs", s.graphs.there.size()},
                                                                                {"execs", s.execs.there.size()},
                                                                                {"programs", s.programs.there.size()}})
        fprintf(file, "left_%s %zu\n", what, n);
    fclose(file);
}
