// The emulated GPU as a program: reads commands from standard input and replies on standard output.
#include "machine.h"
#include <stdio.h>
#include <stdlib.h>

#include <vector>

namespace {

char *memory;
size_t memory_len;

void input(void *to, size_t len) {
    if (fread(to, 1, len, stdin) != len) exit(0); // the parent has ended
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
    unsigned grid[3], block[3];
    input(grid, sizeof grid);
    input(block, sizeof block);
    std::vector<Argument> args(input<uint32_t>());
    std::string kinds, wrong;
    for (Argument &a : args) {
        a.kind = input<char>();
        a.bits = input<uint64_t>();
        kinds += a.kind;
        if (a.kind != 'p') continue;
        if (a.bits >= memory_len) wrong = name + ": a pointer beyond the end of memory";
        a.bits += (uint64_t)memory;
    }
    const Kernel *kernel = find_kernel(name);
    if (!kernel) return name + ": no such kernel";
    if (!wrong.empty()) return wrong;
    if (kinds != kernel->kinds) return name + " expects " + kernel->kinds + ", got " + kinds;
    if (!can_launch(grid, block)) return name + ": an invalid grid or block size";
    run_kernel(*kernel, grid, block, args.data());
    return "";
}

} // namespace

int main(int argc, char **) {
    start_machine(argc > 1);
    for (;;) {
        switch (input<char>()) {
        case 'r':
            memory_len = input<uint64_t>();
            memory = map_memory(memory_len);
            answer("");
            break;
        case 'w': {
            uint64_t at = input<uint64_t>(), len = input<uint64_t>();
            if (at + len > memory_len) die("a write beyond the end of memory");
            input(memory + at, len);
            answer("");
            break;
        }
        case 'g': {
            uint64_t at = input<uint64_t>(), len = input<uint64_t>();
            if (at + len > memory_len) die("a read beyond the end of memory");
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
