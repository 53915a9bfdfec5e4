// Fibers, synchronisation, tensor cores, and the kernel table. Compiled after the kernels' text; its front ends are the program
// driven through pipes (`pipes.cpp`) and the stand-in for NVIDIA's driver (`driver.cpp`).
#include "machine.h"

// `control.rs` relies on these offsets.
static_assert(__builtin_offsetof(Control, rate) == 16 && __builtin_offsetof(Control, skipped) == 56 &&
                  __builtin_offsetof(Control, squared_norm) == 64,
              "offsets in the control block");

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

const int MAX_THREADS = 1024;
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

Fiber fibers[MAX_THREADS];
Group warps[MAX_THREADS / 32], block;
jmp_buf scheduler;
int current, threads;
bool backwards; // run threads last to first
void (*body)(const void *);
const void *body_args;
uint64_t slots[MAX_THREADS];
unsigned words[MAX_THREADS][6];

// Copies in flight, in groups; the last group is open.
struct Copy {
    void *to;
    const void *from; // null: zeros
};
std::vector<std::vector<Copy>> copies[MAX_THREADS];

// Switches to the scheduler; returns when the fiber is resumed.
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
        for (const auto &group : copies[current])
            if (!group.empty()) die("a thread ends with copies in flight");
        copies[current].clear();
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
        if (!any) die("deadlock: threads wait for threads that have ended");
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

void die(const std::string &why) {
    fprintf(stderr, "emulator: %s\n", why.c_str());
    _exit(3);
}

void start_machine(bool from_the_last) {
    backwards = from_the_last;
    make_fibers();
}

char *map_memory(size_t len) {
    size_t page = sysconf(_SC_PAGESIZE), rounded = (len + page - 1) / page * page;
    char *all = (char *)mmap(0, rounded + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED || mprotect(all, rounded, PROT_READ | PROT_WRITE)) die("no memory");
    return all + (rounded - len) / 256 * 256;
}

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

static float as_float(u32 bits) {
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
            d[i] += as_float(of_a) * as_float(of_b);
        }
    }
    wait_for_warp();
}

void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma(d, a, b, true); }

void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma(d, a, b, false); }

// --------------------------------------------------------------------------------------------- copies and matrices

// A copy is performed when it is waited for, not before.
void copy_16(void *to, const void *from, bool there) {
    if ((uintptr_t)to % 16 || (there && (uintptr_t)from % 16)) die("a misaligned 16-byte copy");
    if (copies[current].empty()) copies[current].emplace_back();
    copies[current].back().push_back({to, there ? from : nullptr});
}

void commit_copies() {
    if (copies[current].empty()) copies[current].emplace_back();
    copies[current].emplace_back();
}

void wait_copies_except(int groups) {
    auto &mine = copies[current];
    while ((int)mine.size() > groups + 1) {
        for (const Copy &copy : mine.front()) {
            if (copy.from)
                memcpy(copy.to, copy.from, 16);
            else
                memset(copy.to, 0, 16);
        }
        mine.erase(mine.begin());
    }
}

static void matrices(u32 (&to)[4], const void *row, bool transposed) {
    int me = current, lane = me % 32, warp = me / 32 * 32;
    if ((uintptr_t)row % 16) die("a misaligned matrix row");
    slots[me] = (uint64_t)row;
    wait_for_warp();
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            int r = transposed ? lane % 4 * 2 + half : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + half;
            u32 bits = ((const unsigned short *)slots[warp + i * 8 + r])[column];
            to[i] = half ? to[i] | bits << 16 : bits;
        }
    wait_for_warp();
}

void load_matrices(u32 (&to)[4], const void *row) { matrices(to, row, false); }

void load_matrices_transposed(u32 (&to)[4], const void *row) { matrices(to, row, true); }

// ---------------------------------------------------------------------------------------------------------- kernels

namespace {

template <class T> char kind_of() {
    if (std::is_pointer<T>::value || std::is_class<T>::value) return 'p'; // classes: `In` and the like
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_same<T, double>::value) return 'd';
    return std::is_same<T, unsigned>::value ? 'u' : 'i';
}

template <class T> T read_argument(const Argument &a) {
    T v;
    memcpy(&v, &a.bits, sizeof v);
    return v;
}

template <class F, F f> struct Caller;

template <class... A, void (*f)(A...)> struct Caller<void (*)(A...), f> {
    template <size_t... I> static void with(const Argument *args, std::index_sequence<I...>) { f(read_argument<A>(args[I])...); }
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

} // namespace

const Kernel *find_kernel(const std::string &name) {
    for (const Kernel &kernel : table())
        if (name == kernel.name) return &kernel;
    return 0;
}

bool can_launch(const unsigned (&grid)[3], const unsigned (&block)[3]) {
    uint64_t count = (uint64_t)block[0] * block[1] * block[2];
    return count > 0 && count <= MAX_THREADS && block[2] <= 64 && grid[0] > 0 && grid[0] <= 0x7fffffff && grid[1] > 0 &&
           grid[1] <= 65535 && grid[2] > 0 && grid[2] <= 65535;
}

void run_kernel(const Kernel &kernel, const unsigned (&grid)[3], const unsigned (&block)[3], const Argument *args) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    body = kernel.call;
    body_args = args;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block();
}
