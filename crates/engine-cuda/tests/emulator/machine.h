// What stands before the machine needs of it.
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

// Before anything is run; the order in which a block's threads run between two barriers.
void start_machine(bool from_the_last);

// Null where there is none of the name.
const Kernel *find_kernel(const std::string &name);

// Whether a GPU takes a grid and blocks of this size.
bool can_launch(const unsigned (&grid)[3], const unsigned (&block)[3]);

// The arguments are as the kernel's kinds say.
void run_kernel(const Kernel &kernel, const unsigned (&grid)[3], const unsigned (&block)[3], const Argument *args);

// Memory of a GPU: it ends, but for less than 256 bytes, at a page that may not be touched.
char *map_memory(size_t len);

[[noreturn]] void die(const std::string &why);
