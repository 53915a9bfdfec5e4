//! Every source through NVIDIA's own compiler and assembler, for Ampere and Hopper. Needs NVRTC, which needs no GPU:
//! `tools/check_cuda_kernels.sh` fetches it. Skipped, with a line, where it is not found.

use ddpm_engine_cuda::compile::{available, compile_anew};
use ddpm_engine_cuda::source::SOURCES;

const CAPABILITIES: [(i32, i32); 2] = [(8, 0), (9, 0)];

#[test]
fn all_sources_compile_and_have_their_kernels() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    std::thread::scope(|scope| {
        for capability in CAPABILITIES {
            scope.spawn(move || {
                for source in &SOURCES {
                    let code = compile_anew(source, capability).unwrap_or_else(|e| panic!("{e}"));
                    let has = |name: &str| code.windows(name.len()).any(|w| w == name.as_bytes());
                    for kernel in source.kernels {
                        assert!(has(&format!(".text.{kernel}\0")), "{}: {kernel}", source.name);
                    }
                }
            });
        }
    });
    println!("{} sources compiled for {CAPABILITIES:?}", SOURCES.len());
}

#[test]
fn errors_of_the_compiler_are_told() {
    if let Err(reason) = available() {
        println!("skipped: {reason}");
        return;
    }
    let error = compile_anew(&SOURCES[0], (1, 0)).expect_err("no such GPU");
    assert!(error.contains("pointwise.cu") && error.contains("1.0"), "{error}");
}

/// Each kernel stands in one list. (That each is in its text, the emulator's table and the test above show.)
#[test]
fn no_kernel_is_listed_twice() {
    let mut all: Vec<&str> = SOURCES.iter().flat_map(|s| s.kernels).copied().collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count);
}
