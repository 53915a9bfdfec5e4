// A stand-in for NVIDIA's driver, NVRTC, cuDNN and cuBLASLt: one library with the functions that cudarc calls, whose kernels run on
// the emulated GPU. Asynchronous work (kernels, copies from pinned memory, stream-ordered frees) is delayed as long as CUDA allows,
// until somebody waits for it, so that a missing wait gives wrong results. Undefined behaviour (use after free or destroy, double
// free, wild pointers) ends the process with a message. Errors that a driver reports are reported as the driver does.
//
// Environment variables: FAKE_CUDA_
//   DEVICES     number of GPUs (1)
//   CAPABILITY  of each, "9.0"
//   MEMORY      KiB free on each (4 GiB), of 8 GiB
//   POOLS       0: no memory pools, hence no cuMemAllocAsync
//   DRIVER      the newest CUDA version that the driver supports (13000)
//   NVRTC       version (12090)
//   TARGETS     compute capabilities that NVRTC supports ("80 86 89 90")
//   BROKEN      sources whose names contain this do not compile
//   FAIL        calls that fail, with their CUresult: "launch:120:719 alloc:1:2", that is the 120th kernel; also sync, graph,
//               pinned, module, init, retain. After launch or sync the GPU is lost.
//   ORDER       "backwards": threads of a block run last to first
//   REPORT      a file for counts and for resources not released when the process ends
#include "libraries.h"
#include "nvrtc.h"
#include "state.h"

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
    if (!state().initialized) {
        start_machine(setting("ORDER", "") == "backwards");
        state().devices.resize(devices);
        for (Device &d : state().devices) d.free = strtoull(setting("MEMORY", "4194304").c_str(), 0, 10) << 10;
        state().initialized = true;
    }
    return SUCCESS;
}

API cuDriverGetVersion(int *out) {
    *out = atoi(setting("DRIVER", "13000").c_str());
    return SUCCESS;
}

API cuDeviceGetCount(int *out) {
    Lock lock;
    if (!state().initialized) return NOT_INITIALIZED;
    *out = state().devices.size();
    return SUCCESS;
}

API cuDeviceGet(int *out, int index) {
    Lock lock;
    if (!state().initialized) return NOT_INITIALIZED;
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
    if (!state().initialized) return NOT_INITIALIZED;
    int major = 0, minor = 0;
    sscanf(setting("CAPABILITY", "9.0").c_str(), "%d.%d", &major, &minor);
    switch (attribute) {
    case 75: *out = major; break;
    case 76: *out = minor; break;
    case 115: *out = setting("POOLS", "1") != "0"; break;
    default: die("a device attribute that the stand-in does not know: " + std::to_string(attribute));
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void **out, int device) {
    Lock lock;
    if (!state().initialized) return NOT_INITIALIZED;
    if (int error = failing("retain")) return error;
    Device &d = state().devices.at(device);
    if (d.lost) return d.lost;
    d.refs++;
    *out = &d;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock;
    Device &d = state().devices.at(device);
    if (d.refs == 0) die("a context is released twice");
    d.refs--;
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
    for (Stream *s : state().streams.live)
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
    // Work in flight still completes.
    drain(stream, stream->issued);
    for (Event *e : state().events.live)
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
    if (event->capture) {
        if (!stream->capture) {
            // The stream joins the capture.
            if (stream->done < stream->issued) die("a stream with pending work joins a capture");
            stream->capture = event->capture;
            stream->joined = true;
            stream->invalid = false;
            stream->capturer = std::this_thread::get_id();
            stream->tails.clear();
        }
        if (stream->capture != event->capture) die("captures merge");
        stream->tails.insert(stream->tails.end(), event->tails.begin(), event->tails.end());
        return SUCCESS;
    }
    if (!event->stream || event->stream->done >= event->at) return SUCCESS;
    if (int error = capturing(stream)) return error;
    Stream *other = event->stream;
    uint64_t at = event->at;
    return enqueue(stream, [=] {
        if (state().streams.live.count(other)) drain(other, at);
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
    *event = Event();
    if (stream->capture) {
        event->capture = stream->capture;
        event->tails = stream->tails;
        return SUCCESS;
    }
    event->stream = stream;
    event->at = stream->issued;
    return SUCCESS;
}

API cuEventSynchronize(void *handle) {
    Lock lock;
    Event *event = state().events.get(handle);
    if (int error = usable()) return error;
    if (event->capture) return CAPTURE_UNSUPPORTED;
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
    for (Stream *s : state().streams.live)
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
    if (block == state().pinned.end()) die("pinned memory is freed twice, or was never allocated");
    int error = usable();
    if (!error && block->second.copies) die("pinned memory is freed while a copy from it is in flight");
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
    if (stream->capture) die("a copy from the host during capture");
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
    if (stream->capture) die("a copy to the host during capture");
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
    // Like the driver, by the kernel's signature: the call does not pass a count.
    std::vector<Argument> args;
    for (char kind : kernel->kinds) {
        Argument arg = {kind, 0};
        memcpy(&arg.bits, parameters[args.size()], kind == 'p' || kind == 'd' ? 8 : 4);
        args.push_back(arg);
    }
    Device *device = stream->device;
    Module *module = function->module;
    auto check_pointers = [=] {
        for (const Argument &arg : args)
            if (arg.kind == 'p') check(device, arg.bits, 1, std::string("a pointer for ") + kernel->name);
    };
    check_pointers();
    return enqueue(stream, [=] {
        count("launches");
        if ((device->lost = failing("launch"))) return;
        if (!state().modules.live.count(module)) die(std::string("the module of ") + kernel->name + " was unloaded");
        check_pointers();
        run_kernel(*kernel, size.grid, size.block, args.data());
    });
}

API cuStreamBeginCapture_v2(void *handle, int) {
    Lock lock;
    Stream *stream = state().streams.get(handle);
    if (int error = usable(stream)) return error;
    if (stream->capture) return ILLEGAL_STATE;
    stream->tails.clear();
    stream->joined = false;
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
    if (stream->joined) return CAPTURE_UNMATCHED;
    Graph *graph = stream->capture;
    bool invalid = false;
    // Everything must precede the end of this stream.
    std::vector<bool> before(graph->nodes.size());
    for (size_t i : stream->tails) before[i] = true;
    for (size_t i = graph->nodes.size(); i-- > 0;)
        if (before[i])
            for (size_t j : graph->nodes[i].depends_on) before[j] = true;
    bool unjoined = std::find(before.begin(), before.end(), false) != before.end();
    for (Stream *s : state().streams.live)
        if (s->capture == graph) {
            invalid = invalid || s->invalid;
            if (s != stream) count("joined");
            s->capture = 0;
        }
    for (Event *e : state().events.live)
        if (e->capture == graph) *e = Event();
    if (invalid || unjoined) {
        state().graphs.destroy(graph);
        return invalid ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
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
    // In a random order that the edges allow, different each time.
    static uint32_t random = 1;
    size_t count = exec->nodes.size();
    std::vector<std::vector<size_t>> readers(count);
    std::vector<size_t> missing(count), ready;
    for (size_t i = 0; i < count; i++) {
        missing[i] = exec->nodes[i].depends_on.size();
        for (size_t j : exec->nodes[i].depends_on) readers[j].push_back(i);
        if (!missing[i]) ready.push_back(i);
    }
    while (!ready.empty()) {
        random = random * 1664525 + 1013904223;
        std::swap(ready[(random >> 8) % ready.size()], ready.back());
        size_t next = ready.back();
        ready.pop_back();
        Work node = exec->nodes[next].work;
        if (int error = enqueue(stream, [=] {
                if (!stream->device->lost) node();
            }))
            return error;
        for (size_t i : readers[next])
            if (--missing[i] == 0) ready.push_back(i);
    }
    return SUCCESS;
}

// ----------------------------------------------------------------------------------------------------------------- report

__attribute__((destructor)) static void report() {
    std::string path = setting("REPORT", "");
    FILE *file = path.empty() ? 0 : fopen(path.c_str(), "w");
    if (!file) return;
    State &s = state();
    for (auto &[what, n] : s.counts) fprintf(file, "%s %d\n", what.c_str(), n);
    size_t refs = 0, blocks = 0;
    for (Device &d : s.devices) {
        refs += d.refs;
        for (auto &block : d.blocks) blocks += !block.second.freed;
    }
    for (auto [what, n] : std::initializer_list<std::pair<const char *, size_t>>{{"contexts", refs},
                                                                                {"memory", blocks},
                                                                                {"pinned", s.pinned.size()},
                                                                                {"streams", s.streams.live.size()},
                                                                                {"events", s.events.live.size()},
                                                                                {"modules", s.modules.live.size()},
                                                                                {"graphs", s.graphs.live.size()},
                                                                                {"execs", s.execs.live.size()},
                                                                                {"programs", s.programs.live.size()},
                                                                                {"library_objects", objects().live.size()}})
        fprintf(file, "left_%s %zu\n", what, n);
    fclose(file);
}
