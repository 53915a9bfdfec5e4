// What the front ends need from the machine.
#pragma once
#include <stdint.h>

#include <string>

struct Argument {
    char kind; // p (an address), i, u, f, d
    uint64_t bits;
};

struct Kernel {
    const char *name;
    std::string kinds; // of its arguments
    void (*call)(const void *);
};

// Call before anything runs; `from_the_last`: a block's threads run last to first between barriers.
void start_machine(bool from_the_last);

// Null if there is no kernel of this name.
const Kernel *find_kernel(const std::string &name);

// Whether a GPU supports this grid and block size.
bool can_launch(const unsigned (&grid)[3], const unsigned (&block)[3]);

// The arguments must match the kernel's kinds.
void run_kernel(const Kernel &kernel, const unsigned (&grid)[3], const unsigned (&block)[3], const Argument *args);

// GPU memory that ends (within 256 bytes) at an inaccessible page.
char *map_memory(size_t len);

[[noreturn]] void die(const std::string &why);
