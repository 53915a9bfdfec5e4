// The functions of NVRTC: its "machine code" is a source's name with the target architecture.
#pragma once
#include "state.h"

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
