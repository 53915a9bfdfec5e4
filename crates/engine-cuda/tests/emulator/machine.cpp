// Fibers, waiting, tensor cores, and the loop that takes commands from standard input. Behind the kernels' text.

// `control.rs` writes and reads there.
static_assert(__builtin_offsetof(Control, rate) == 16 && __builtin_offsetof(Control, held) == 56 &&
                  __builtin_offsetof(Control, squared_norm) == 64,
              "places in the control block");

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

const int MOST_THREADS = 1024;
const size_t STACK = 256 << 10;

enum Status { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun;
    Status status;
};

struct Group {
    int alive, waiting;
};

Fiber fibers[MOST_THREADS];
Group warps[MOST_THREADS / 32], block;
jmp_buf scheduler;
int current, threads;
bool backwards; // the order in which threads run
void (*body)(const void *);
const void *body_args;
uint64_t slots[MOST_THREADS];
unsigned words[MOST_THREADS][6];

[[noreturn]] void die(const std::string &why) {
    fprintf(stderr, "emulator: %s\n", why.c_str());
    exit(3);
}

// Hands over to the scheduler; comes back when the fiber is run again.
__attribute__((noinline)) void pause_fiber() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void release(Group &group, int first, int count, Status waiting) {
    if (group.waiting == 0 || group.waiting < group.alive) return;
    group.waiting = 0;
    for (int i = first; i < first + count && i < threads; i++)
        if (fibers[i].status == waiting) fibers[i].status = READY;
}

void run_fiber() {
    for (;;) {
        body(body_args);
        int warp = current / 32;
        fibers[current].status = DONE;
        warps[warp].alive--;
        block.alive--;
        release(warps[warp], warp * 32, 32, AT_WARP);
        release(block, 0, threads, AT_BLOCK);
        pause_fiber();
    }
}

void run_block() {
    for (int i = 0; i < threads; i++) fibers[i].status = READY;
    for (int w = 0; w < (threads + 31) / 32; w++) warps[w] = {threads - 32 * w < 32 ? threads - 32 * w : 32, 0};
    block = {threads, 0};
    while (block.alive > 0) {
        bool any = false;
        for (int turn = 0; turn < threads; turn++) {
            current = backwards ? threads - 1 - turn : turn;
            Fiber &fiber = fibers[current];
            if (fiber.status != READY) continue;
            any = true;
            threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
            if (!_setjmp(scheduler)) {
                if (fiber.begun) _longjmp(fiber.at, 1);
                fiber.begun = true;
                setcontext(&fiber.start);
            }
        }
        if (!any) die("threads wait for threads that never come");
    }
}

void make_fibers() {
    for (Fiber &fiber : fibers) {
        getcontext(&fiber.start);
        void *stack = mmap(0, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) die("no memory for stacks");
        fiber.start.uc_stack = {stack, 0, STACK};
        fiber.start.uc_link = 0;
        makecontext(&fiber.start, run_fiber, 0);
        fiber.begun = false;
    }
}

void wait(Group &group, int first, int count, Status status) {
    group.waiting++;
    if (group.waiting == group.alive) return release(group, first, count, status);
    fibers[current].status = status;
    pause_fiber();
}

} // namespace

void __syncthreads() { wait(block, 0, threads, AT_BLOCK); }

void wait_for_warp() { wait(warps[current / 32], current / 32 * 32, 32, AT_WARP); }

uint64_t exchange(uint64_t mine, int lane_of_other) {
    int me = current;
    slots[me] = mine;
    wait_for_warp();
    uint64_t other = slots[me / 32 * 32 + lane_of_other];
    wait_for_warp();
    return other;
}

// ------------------------------------------------------------------------------------------------------ tensor cores

u32 pack_bf16(float low, float high) {
    auto round = [](float x) {
        u32 bits;
        memcpy(&bits, &x, 4);
        if (x != x) return bits >> 16 | 64;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

u32 round_tf32(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if (x != x) return bits;
    return (bits + 0x1000) & ~0x1fffu;
}

static float number(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bool bf16) {
    int me = current, lane = me % 32, warp = me / 32 * 32;
    for (int i = 0; i < 4; i++) words[me][i] = a[i];
    for (int i = 0; i < 2; i++) words[me][4 + i] = b[i];
    wait_for_warp();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < (bf16 ? 16 : 8); k++) {
            int word = bf16 ? k / 2 : k;
            u32 of_a = words[warp + row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
            u32 of_b = words[warp + column * 4 + word % 4][4 + word / 4];
            if (bf16) {
                of_a = of_a >> k % 2 * 16 << 16;
                of_b = of_b >> k % 2 * 16 << 16;
            }
            d[i] += number(of_a) * number(of_b);
        }
    }
    wait_for_warp();
}

void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma(d, a, b, true); }

void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma(d, a, b, false); }

// ---------------------------------------------------------------------------------------------------------- commands

namespace {

struct Argument {
    char kind; // p, i, u, f, d
    uint64_t bits;
};

char *memory;
size_t memory_len;

template <class T> char kind_of() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_same<T, double>::value) return 'd';
    return std::is_same<T, unsigned>::value ? 'u' : 'i';
}

template <class T> T take(const Argument &a) {
    T v;
    uint64_t bits = a.kind == 'p' ? (uint64_t)(memory + a.bits) : a.bits;
    memcpy(&v, &bits, sizeof v);
    return v;
}

struct Kernel {
    const char *name;
    std::string kinds;
    void (*call)(const void *);
};

template <class F, F f> struct Caller;

template <class... A, void (*f)(A...)> struct Caller<void (*)(A...), f> {
    template <size_t... I> static void with(const Argument *args, std::index_sequence<I...>) { f(take<A>(args[I])...); }
    static void call(const void *args) { with((const Argument *)args, std::index_sequence_for<A...>()); }
    static std::string kinds() { return {kind_of<A>()...}; }
};

#define ENTRY(NAME) {#NAME, Caller<decltype(&NAME), &NAME>::kinds(), Caller<decltype(&NAME), &NAME>::call},
const std::vector<Kernel> &table() {
    static const std::vector<Kernel> kernels = {
#include "entries.h"
    };
    return kernels;
}

void input(void *to, size_t len) {
    if (fread(to, 1, len, stdin) != len) exit(0); // the other side has gone
}

template <class T> T input() {
    T v;
    input(&v, sizeof v);
    return v;
}

void output(const void *from, size_t len) { fwrite(from, 1, len, stdout); }

void answer(const std::string &error) {
    uint32_t len = error.size();
    output(&len, 4);
    output(error.data(), len);
    fflush(stdout);
}

std::string launch() {
    std::string name(input<uint32_t>(), ' ');
    input(&name[0], name.size());
    gridDim = input<dim3>();
    blockDim = input<dim3>();
    std::vector<Argument> args(input<uint32_t>());
    for (Argument &a : args) {
        a.kind = input<char>();
        a.bits = input<uint64_t>();
    }
    for (const Kernel &kernel : table()) {
        if (name != kernel.name) continue;
        std::string kinds;
        for (const Argument &a : args) {
            kinds += a.kind;
            if (a.kind == 'p' && a.bits >= memory_len) return name + ": a pointer beyond the memory";
        }
        if (kinds != kernel.kinds) return name + " takes " + kernel.kinds + ", was given " + kinds;
        uint64_t count = (uint64_t)blockDim.x * blockDim.y * blockDim.z;
        if (count == 0 || count > MOST_THREADS || gridDim.x * gridDim.y * gridDim.z == 0 || gridDim.y > 65535 ||
            gridDim.z > 65535)
            return name + ": a grid that no GPU takes";
        threads = count;
        body = kernel.call;
        body_args = args.data();
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block();
        return "";
    }
    return name + ": no such kernel";
}

} // namespace

int main(int argc, char **) {
    backwards = argc > 1;
    make_fibers();
    for (;;) {
        switch (input<char>()) {
        case 'r': { // reserve: the memory ends at a page that may not be touched
            memory_len = input<uint64_t>();
            size_t page = sysconf(_SC_PAGESIZE), whole = (memory_len + page - 1) / page * page;
            char *all = (char *)mmap(0, whole + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (all == MAP_FAILED || mprotect(all, whole, PROT_READ | PROT_WRITE)) die("no memory");
            memory = all + (whole - memory_len) / 256 * 256;
            answer("");
            break;
        }
        case 'w': {
            uint64_t at = input<uint64_t>(), len = input<uint64_t>();
            if (at + len > memory_len) die("a write beyond the memory");
            input(memory + at, len);
            answer("");
            break;
        }
        case 'g': {
            uint64_t at = input<uint64_t>(), len = input<uint64_t>();
            if (at + len > memory_len) die("a read beyond the memory");
            answer("");
            output(memory + at, len);
            fflush(stdout);
            break;
        }
        case 'l': answer(launch()); break;
        default: die("an unknown command");
        }
    }
}
