// State of the stand-in driver, and what its functions share.
#pragma once
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
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
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
    int refs = 0; // references to its primary context
    int lost = 0;    // the error that every call returns from now on
    size_t free = 0;
    size_t pooled = 0; // freed in stream order; returned at the next synchronisation
    std::map<uint64_t, Block> blocks;
};

struct Pinned {
    size_t len;
    int copies; // in flight from or to it
};

// A call and the nodes it waits for.
struct Node {
    Work work;
    std::vector<size_t> depends_on;
};

struct Graph {
    std::vector<Node> nodes;
};

struct GraphExec {
    Device *device;
    std::vector<Node> nodes;
};

struct Stream {
    Device *device;
    std::deque<Work> queue;
    uint64_t issued = 0, done = 0;
    // The graph being captured, whether the stream joined through an event, and the nodes that the next one waits for.
    Graph *capture = 0;
    bool joined = false;
    std::vector<size_t> tails;
    bool invalid = false;
    std::thread::id capturer;
};

struct Event {
    Stream *stream = 0; // null: nothing to wait for
    uint64_t at = 0;
    Graph *capture = 0; // set if recorded during this capture
    std::vector<size_t> tails;
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

// Objects that the program refers to by address.
template <class T> struct Handles {
    const char *what;
    std::set<T *> live;

    T *make(const T &t) {
        T *created = new T(t);
        live.insert(created);
        return created;
    }
    T *get(void *handle) const {
        T *t = (T *)handle;
        if (!live.count(t)) die(std::string("no such ") + what + ", or it was destroyed");
        return t;
    }
    void destroy(T *t) {
        live.erase(t);
        delete t;
    }
};

// Never destroyed, as the order of destruction at exit is unspecified.
struct State {
    std::mutex mutex;
    bool initialized = false;
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

// The error that this call of its kind should return.
int failing(const std::string &what) {
    int call = ++state().calls[what], at, error;
    std::istringstream all(setting("FAIL", ""));
    for (std::string one; all >> one;)
        if (one.rfind(what + ":", 0) == 0 && sscanf(one.c_str() + what.size(), ":%d:%d", &at, &error) == 2 && at == call)
            return error;
    return SUCCESS;
}

// The checks of every call within a context.
int usable() {
    if (!state().initialized) return NOT_INITIALIZED;
    if (!current) return INVALID_CONTEXT;
    if (!current->refs) return CONTEXT_IS_DESTROYED;
    return current->lost;
}

int usable(const Stream *stream) {
    int error = usable();
    return !error && stream->device != current ? (int)INVALID_CONTEXT : error;
}

// For calls that are not allowed on a capturing stream: they invalidate the capture.
int capturing(Stream *stream) {
    if (!stream->capture) return SUCCESS;
    stream->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

// For calls that act on the whole context, on the capturing thread.
int captured_here() {
    for (Stream *s : state().streams.live)
        if (s->capture && s->capturer == std::this_thread::get_id()) return capturing(s);
    return SUCCESS;
}

int enqueue(Stream *stream, Work work) {
    if (stream->capture) {
        if (stream->invalid) return CAPTURE_INVALIDATED;
        stream->capture->nodes.push_back({std::move(work), stream->tails});
        stream->tails = {stream->capture->nodes.size() - 1};
        return SUCCESS;
    }
    stream->queue.push_back(std::move(work));
    stream->issued++;
    int &peak = state().counts["max_pending"];
    peak = std::max(peak, (int)stream->queue.size());
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
    if (!inside(device, at, len)) die(what + ": not GPU memory, or freed");
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
    if (block == device->blocks.end() || block->second.freed) die("GPU memory is freed twice, or was never allocated");
    block->second.freed = true;
}

void end_free(Device *device, uint64_t at, size_t &to) {
    size_t page = sysconf(_SC_PAGESIZE), len = device->blocks[at].len;
    void *first = (void *)(at / page * page);
    // The address range is never reused.
    madvise(first, at % page + len, MADV_DONTNEED);
    mprotect(first, at % page + len, PROT_NONE);
    to += len;
}

} // namespace
